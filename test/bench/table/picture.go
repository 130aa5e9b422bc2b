package table

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// The picture's frame, in SVG units.
const (
	width, height = 720, 360
	left, right   = 70, 150
	top, bottom   = 40, 50
)

var colours = []string{"#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#475569"}

// SVG draws a series: lines with points, or bars.
func (s *Series) SVG() []byte {
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n", width, height)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="white"/><text x="%d" y="20" font-size="14">%s</text>`+"\n", left, html.EscapeString(s.Title))
	minX, maxX, maxY := s.bounds()
	atX := func(x float64) float64 {
		if s.LogX {
			return left + (math.Log2(x)-math.Log2(minX))/max(1e-9, math.Log2(maxX)-math.Log2(minX))*(width-left-right)
		}
		return left + (x-minX)/max(1e-9, maxX-minX)*(width-left-right)
	}
	atY := func(y float64) float64 { return height - bottom - y/max(1e-9, maxY)*(height-top-bottom) }
	for i := range 5 {
		y := maxY * float64(i) / 4
		fmt.Fprintf(&b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end">%s</text>`+"\n",
			left, width-right, atY(y), atY(y), left-6, atY(y)+4, number(y))
	}
	for _, x := range s.ticks(minX, maxX) {
		fmt.Fprintf(&b, `<text x="%.1f" y="%d" text-anchor="middle">%s</text>`+"\n", atX(x), height-bottom+16, number(x))
	}
	fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="middle">%s</text><text x="14" y="%d" transform="rotate(-90 14 %d)" text-anchor="middle">%s</text>`+"\n",
		(left+width-right)/2, height-12, html.EscapeString(s.X), (top+height-bottom)/2, (top+height-bottom)/2, html.EscapeString(s.Y))
	for i, line := range s.Lines {
		colour := colours[i%len(colours)]
		if s.Bars {
			wide := float64(width-left-right) / float64(max(1, len(line.X))) * 0.9
			for j, x := range line.X {
				fmt.Fprintf(&b, `<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" fill="%s" fill-opacity="0.6"/>`+"\n",
					atX(x), atY(line.Y[j]), wide, height-bottom-atY(line.Y[j]), colour)
			}
		} else {
			points := make([]string, 0, len(line.X))
			for j, x := range line.X {
				points = append(points, fmt.Sprintf("%.1f,%.1f", atX(x), atY(line.Y[j])))
			}
			fmt.Fprintf(&b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/>`+"\n", strings.Join(points, " "), colour)
		}
		fmt.Fprintf(&b, `<rect x="%d" y="%d" width="10" height="10" fill="%s"/><text x="%d" y="%d">%s</text>`+"\n",
			width-right+12, top+i*18, colour, width-right+28, top+i*18+9, html.EscapeString(line.Name))
	}
	b.WriteString("</svg>\n")
	return []byte(b.String())
}

func (s *Series) bounds() (minX, maxX, maxY float64) {
	minX, maxX = math.Inf(1), math.Inf(-1)
	for _, l := range s.Lines {
		minX, maxX = min(minX, slices.Min(l.X)), max(maxX, slices.Max(l.X))
		maxY = max(maxY, slices.Max(l.Y))
	}
	return minX, maxX, maxY * 1.05
}

// ticks are the values of x where there are few, else five of them.
func (s *Series) ticks(minX, maxX float64) []float64 {
	if s.LogX {
		return s.Lines[0].X
	}
	ticks := make([]float64, 0, 6)
	for i := range 6 {
		ticks = append(ticks, minX+(maxX-minX)*float64(i)/5)
	}
	return ticks
}
