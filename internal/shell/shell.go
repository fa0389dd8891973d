// Package shell writes words as a shell reads them.
package shell

import "strings"

// Quote is a word as a POSIX shell reads it, whatever is in it: what a device, a file or a snapshot calls itself may
// be printed in a command that somebody runs.
func Quote(word string) string {
	plain := func(r rune) bool {
		return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' ||
			strings.ContainsRune("_./:=,@%+-", r)
	}
	if word != "" && strings.IndexFunc(word, func(r rune) bool { return !plain(r) }) < 0 {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}
