// Package nearest finds what a mistyped word may have been meant as.
package nearest

import (
	"cmp"
	"slices"
	"strings"
)

// most is how many are named at most.
const most = 3

// To returns the candidates that a word is likely to stand for, the likeliest first: those that begin with it, then
// those that differ from it in few letters. It returns none rather than a wild guess, and at most three.
func To(word string, candidates []string) []string {
	type guess struct {
		name string
		far  int
	}
	var out []guess
	word = strings.ToLower(word)
	for _, c := range candidates {
		name := strings.ToLower(c)
		limit := max(1, min(len(word), len(name))/3)
		switch far := distance(word, name); {
		case word == "":
		case strings.HasPrefix(name, word):
			out = append(out, guess{c, len(name) - len(word)})
		case far <= limit && far < len(word):
			out = append(out, guess{c, 1000 * far})
		case len(word) > 2 && strings.Contains(name, word):
			out = append(out, guess{c, 100000})
		}
	}
	slices.SortStableFunc(out, func(a, b guess) int { return cmp.Compare(a.far, b.far) })

	var names []string
	for _, g := range out {
		if len(names) < most && !slices.Contains(names, g.name) {
			names = append(names, g.name)
		}
	}
	return names
}

// Ask is the question that an error ends with: " (did you mean a or b?)"; "" where nothing is near.
func Ask(word string, candidates []string) string {
	names := To(word, candidates)
	if len(names) == 0 {
		return ""
	}
	return " (did you mean " + Or(names) + "?)"
}

// Or writes alternatives: a, b or c.
func Or(names []string) string {
	if len(names) < 2 {
		return strings.Join(names, "")
	}
	last := len(names) - 1
	return strings.Join(names[:last], ", ") + " or " + names[last]
}

// longest is what is compared of a word: longer ones are no slip of a finger.
const longest = 64

// distance counts the letters that have to be inserted, removed, replaced, or swapped with the next one.
func distance(a, b string) int {
	if len(a) > longest || len(b) > longest {
		return max(len(a), len(b))
	}
	before, last, now := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := range len(a) {
		now[0] = i + 1
		for j := range len(b) {
			replaced := last[j]
			if a[i] != b[j] {
				replaced++
			}
			now[j+1] = min(replaced, last[j+1]+1, now[j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				now[j+1] = min(now[j+1], before[j-1]+1)
			}
		}
		before, last, now = last, now, before
	}
	return last[len(b)]
}
