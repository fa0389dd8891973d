package hosttest

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// hexMark begins binary content: its size, and those rows of it that are not all zeros, e.g. "hex 1000 0:86802918
// 100:0d000100", all in hexadecimal, each row without the zeros at its end.
const hexMark = "hex "

// hexRow is how many bytes are a row; standardConfig how many are the least that is written so, a header of config
// space.
const (
	hexRow         = 16
	standardConfig = 64
)

func formatHex(content string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s%x", hexMark, len(content))
	for at := 0; at < len(content); at += hexRow {
		if row := strings.TrimRight(content[at:min(at+hexRow, len(content))], "\x00"); row != "" {
			fmt.Fprintf(&b, " %x:%x", at, row)
		}
	}
	return b.String()
}

func parseHex(s string) (string, error) {
	words := strings.Fields(strings.TrimPrefix(s, hexMark))
	if len(words) == 0 {
		return "", errors.New("no size")
	}
	size, err := strconv.ParseUint(words[0], 16, 20)
	if err != nil {
		return "", err
	}
	content := make([]byte, size)
	for _, w := range words[1:] {
		offset, row, _ := strings.Cut(w, ":")
		at, err := strconv.ParseUint(offset, 16, 20)
		if err != nil {
			return "", err
		}
		b, err := hex.DecodeString(row)
		if err != nil {
			return "", err
		}
		if at+uint64(len(b)) > size {
			return "", errors.New("a row is behind the end")
		}
		copy(content[at:], b)
	}
	return string(content), nil
}
