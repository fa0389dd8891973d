package shell

import (
	"os/exec"
	"testing"
)

// What is quoted is one word for the shell, and the same.
func TestQuote(t *testing.T) {
	for word, want := range map[string]string{
		"vfio-pci": "vfio-pci", "0000:01:00.0": "0000:01:00.0", "(null)": "'(null)'", "": "''", "a b": "'a b'",
		"$(reboot)": "'$(reboot)'", "it's": `'it'\''s'`, "a;b|c&d>e": "'a;b|c&d>e'", "~": "'~'", "ü": "'ü'", "-n": "-n",
		"a\nb": "'a\nb'", "`x`": "'`x`'", "*": "'*'",
	} {
		if got := Quote(word); got != want {
			t.Errorf("%q: %s, want %s", word, got, want)
		}
		out, err := exec.Command("sh", "-c", "printf %s "+Quote(word)).Output()
		if word != "-n" && (err != nil || string(out) != word) {
			t.Errorf("%q: the shell makes %q of it, %v", word, out, err)
		}
	}
}
