package host

import "path"

// Fake is for tests: reads come from a folder, confined as a captured tree is, and writes go to write, under the name
// relative to the root as far as it is known without following links. It is not Live.
func Fake(dir string, write func(name, value string) error) (*Host, error) {
	t, err := openDisk(dir, true)
	if err != nil {
		return nil, err
	}
	return &Host{Dir: Dir{tree: fake{tree: t, answer: write}, path: dir}}, nil
}

type fake struct {
	tree
	at     string
	answer func(name, value string) error
}

func (f fake) open(name string) (tree, error) {
	t, err := f.tree.open(name)
	if err != nil {
		return nil, err
	}
	return fake{tree: t, at: path.Join(f.at, name), answer: f.answer}, nil
}

func (f fake) write(name, value string) error { return f.answer(path.Join(f.at, name), value) }
