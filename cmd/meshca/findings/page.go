package findings

import (
	"fmt"
	"slices"
	"strings"
)

// Page is about one code.
type Page struct {
	Code  string `json:"code"`
	Title string `json:"title"`
	Means string `json:"means"`
	See   string `json:"see,omitempty"` // how to see it by other means; empty where the finding says it
	Do    string `json:"do"`
}

// Find returns the page of a code, however it is spelt.
func Find(code string) (Page, bool) {
	for _, p := range All() {
		if strings.EqualFold(p.Code, code) {
			return p, true
		}
	}
	return Page{}, false
}

// Codes returns all codes in the order of the pages.
func Codes() (codes []string) {
	for _, p := range All() {
		codes = append(codes, p.Code)
	}
	return codes
}

// All returns all pages. The slice is the caller's.
func All() []Page { return slices.Concat(workloads, installation, effects, refusals) }

// Markdown is all pages as one.
func Markdown() string {
	var b strings.Builder
	b.WriteString("# Findings\n\nWhat each code means and what to do. `meshca explain CODE` prints its part of this page.\n")
	for _, g := range []struct {
		title string
		pages []Page
	}{{"Workloads of a running mesh (`meshca status`)", workloads}, {"A cluster or an installation (`meshca check`)", installation}, {"Policies that are accepted and do not do what they say", effects}, {"Policies that are refused", refusals}} {
		fmt.Fprintf(&b, "\n## %s\n", g.title)
		for _, p := range g.pages {
			fmt.Fprintf(&b, "\n### %s: %s\n\n%s\n", p.Code, p.Title, p.Means)
			if p.See != "" {
				fmt.Fprintf(&b, "\n**How to see it**: %s\n", p.See)
			}
			fmt.Fprintf(&b, "\n**What to do**: %s\n", p.Do)
		}
	}
	return b.String()
}
