package table

import (
	"encoding/xml"
	"io"
	"strings"
	"testing"
	"time"
)

func example() *Part {
	p := &Part{Name: "part", Title: "A part", Method: "As it is done.", Machine: "a machine", Commit: "c0ffee", Command: "bench",
		Began: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), Took: 61, Versions: map[string]string{"Go": "1.26", "Envoy": "1.40"}}
	for _, v := range []float64{3, 1, 2} {
		p.Add("speed", "ours", "ms", v)
		p.Add("speed", "theirs", "ms", 10*v)
	}
	p.Find("speed", "ours").Goal = AtMost(1.5)
	p.Add("rate", "ours", "", 12345).Goal = AtLeast(12000)
	return p
}

// A goal is met by the median, and one that is missed stays where it is.
func TestPage(t *testing.T) {
	page := string(Page([]*Part{example()}, "benchmarks"))
	for _, want := range []string{
		"## A part\n\nAs it is done.",
		"| speed | ours | 2.00 ms | 1.00 – 3.00 | at most 1.50 | **missed** |",
		"|  | theirs | 20.0 ms | 10.0 – 30.0 |  |  |",
		"| rate | ours | 12,345  |  | at least 12,000 | met |",
		"2026-03-01 12:00 UTC, in 1m1s, on a machine; commit c0ffee; `bench`; raw figures: [part.json](benchmarks/part.json). Versions: Envoy 1.40, Go 1.26.",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q:\n%s", want, page)
		}
	}
	if strings.Contains(page, "quick") && !strings.Contains(page, "bench-quick") {
		t.Error("a full run is called a quick one")
	}
}

func TestSaveAndLoad(t *testing.T) {
	dir := t.TempDir()
	if err := example().Save(dir); err != nil {
		t.Fatal(err)
	}
	all, err := Load(dir, []string{"none", "part"})
	if err != nil || len(all) != 1 {
		t.Fatal(all, err)
	}
	if got, want := string(Page(all, "b")), string(Page([]*Part{example()}, "b")); got != want {
		t.Errorf("read back it is\n%s\nwant\n%s", got, want)
	}
}

// A picture is XML, whatever stands in its names.
func TestSVG(t *testing.T) {
	for _, s := range []Series{
		{Title: "a < b & c", X: "x", Y: "y", LogX: true, Lines: []Line{{Name: "\"one\"", X: []float64{1, 4, 16}, Y: []float64{1, 2, 3}}}},
		{Title: "bars", Bars: true, Lines: []Line{{Name: "all", X: []float64{0, 1, 2}, Y: []float64{0, 0, 0}}}},
	} {
		d := xml.NewDecoder(strings.NewReader(string(s.SVG())))
		for {
			_, err := d.Token()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v\n%s", s.Title, err, s.SVG())
			}
		}
	}
}
