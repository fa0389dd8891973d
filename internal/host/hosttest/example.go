package hosttest

import "os"

// LabFolder unpacks the captured host of the lab for an example, which has no test to tell of errors, and returns the
// folder's name, and what removes it.
func LabFolder() (dir string, remove func()) {
	dir, err := os.MkdirTemp("", "host")
	if err != nil {
		panic(err)
	}
	t, err := Parse(labHost)
	if err == nil {
		err = t.unpackAll(dir)
	}
	if err != nil {
		panic(err)
	}
	return dir, func() { _ = os.RemoveAll(dir) }
}
