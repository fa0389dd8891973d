package terminal

import (
	"bytes"
	"encoding/json"
	"testing"
)

// What a terminal takes for orders is spelt out, however it is cut into writes; all else is the same.
func TestPrintable(t *testing.T) {
	for text, want := range map[string]string{
		"plain, ümlaut 網\tand\n":       "plain, ümlaut 網\tand\n",
		"\x1b]52;c;ZXZpbA==\x07":       `\u001b]52;c;ZXZpbA==\u0007`,
		"a\rb\x00\x7f\u009b31m":        `a\u000db\u0000\u007f\u009b31m`,
		"bidi \u202egnp.exe":           `bidi \u202egnp.exe`,
		"tag \U000e0041":               `tag \udb40\udc41`,
		"broken \xff\xc3":              `broken \u00ff\u00c3`,
		"\ufffd is what it says it is": "\ufffd is what it says it is",
	} {
		for size := 1; size <= len(text); size++ {
			var out bytes.Buffer
			p := NewPrintable(&out)
			for b := []byte(text); len(b) > 0; {
				n := min(size, len(b))
				if written, err := p.Write(b[:n]); written != n || err != nil {
					t.Fatalf("%d, %v", written, err)
				}
				b = b[n:]
			}
			if err := p.Flush(); err != nil || out.String() != want {
				t.Errorf("%q by %d: %q, want %q, %v", text, size, out.String(), want, err)
			}
		}
	}
}

// Within JSON a character that is spelt out is still that character.
func TestPrintableJSON(t *testing.T) {
	const name = "a\x1b\u202e\u009b\U000e0041z"
	var out bytes.Buffer
	e := json.NewEncoder(NewPrintable(&out))
	e.SetEscapeHTML(false)
	if err := e.Encode(map[string]string{"name": name}); err != nil {
		t.Fatal(err)
	}
	var back map[string]string
	if err := json.Unmarshal(out.Bytes(), &back); err != nil || back["name"] != name ||
		bytes.ContainsFunc(out.Bytes(), order) {
		t.Errorf("%q, %v", out.String(), err)
	}
}
