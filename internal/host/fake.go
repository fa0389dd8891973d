package host

import "path"

// Fake is for tests: a live host whose files are those of a folder, confined as a captured tree is, and whose system
// answers everything else.
func Fake(dir string, system System) (*Host, error) {
	t, err := openDisk(dir, true)
	if err != nil {
		return nil, err
	}
	return &Host{Dir: Dir{tree: fake{tree: t, system: system}, path: dir}, system: system}, nil
}

// fake asks the system before each operation, under the name relative to the root as far as it is known without
// following links.
type fake struct {
	tree
	at     string
	system System
}

func (f fake) ask(op, name string) error { return f.system.Operation(op, path.Join(f.at, name)) }

func (f fake) open(name string) (tree, error) {
	if err := f.ask("open", name); err != nil {
		return nil, err
	}
	t, err := f.tree.open(name)
	if err != nil {
		return nil, err
	}
	return fake{tree: t, at: path.Join(f.at, name), system: f.system}, nil
}

func (f fake) read(name string) ([]byte, error) {
	if err := f.ask("read", name); err != nil {
		return nil, err
	}
	return f.tree.read(name)
}

func (f fake) attribute(name string, steady bool) (string, error) {
	if err := f.ask("read", name); err != nil {
		return "", err
	}
	return f.tree.attribute(name, steady)
}

func (f fake) readlink(name string) (string, error) {
	if err := f.ask("readlink", name); err != nil {
		return "", err
	}
	return f.tree.readlink(name)
}

func (f fake) readdir(name string) ([]string, error) {
	if err := f.ask("readdir", name); err != nil {
		return nil, err
	}
	return f.tree.readdir(name)
}

func (f fake) file(name string) (File, error) {
	if err := f.ask("open", name); err != nil {
		return nil, err
	}
	return f.tree.file(name)
}

func (f fake) write(name, value string) error {
	name = path.Join(f.at, name)
	if err := f.system.Operation("write", name); err != nil {
		return err
	}
	return f.system.Write(name, value)
}
