package main

import (
	"errors"
	"io"
	"os"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/cmd/internal/lease"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/holder"
)

// errDiffers is what plan and status end with when there is something to do. Nothing is said of it: they have.
var errDiffers = errors.New("the host is not as declared")

// declaredOptions are what plan, apply and status have in common.
type declaredOptions struct {
	file      string // instead of host.yaml and its drop-ins
	accept    bool
	late      bool
	boot      bool
	watching  bool // what is not as declared on purpose is left alone
	keepGoing bool
	wait      time.Duration // at boot, for devices
	confirm   time.Duration // 0: it need not be
	force     []holder.Kind
	timeout   time.Duration
}

func (o *declaredOptions) flags(e *env) []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{
			Name:        "file",
			Aliases:     []string{"f"},
			Usage:       "read `FILE` instead of /etc/viaduct/host.yaml and host.d; - is standard input",
			Destination: &o.file,
			TakesFile:   true,
		},
		&cli.BoolFlag{
			Name:        "accept",
			Usage:       "accept what changed since the last apply (another card in a slot, a group that has grown)",
			Destination: &o.accept,
		},
		&cli.BoolFlag{
			Name:        "late",
			Usage:       "include what waits for a bond (after_bond)",
			Destination: &o.late,
		},
		e.jsonFlag(),
	}
}

// load reads what is declared.
func (o *declaredOptions) load(h *iommu.Host) (*hostfile.Host, error) {
	if o.file == "" {
		return hostfile.Load(h)
	}
	var content []byte
	var err error
	if o.file == "-" {
		content, err = io.ReadAll(os.Stdin)
	} else {
		content, err = os.ReadFile(o.file)
	}
	if err != nil {
		return nil, err
	}
	s, err := hostfile.Parse(o.file, content)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// manager works with the declared host as these options say.
func (o *declaredOptions) manager(e *env, s *sriov.Handle) (*declared.Manager, error) {
	return e.declared(s, o.options())
}

func (o *declaredOptions) options() declared.Options {
	return declared.Options{Force: o.force, Accept: o.accept, Late: o.late, Boot: o.boot}
}

func planCommand(e *env) *cli.Command {
	var o declaredOptions
	return command(&cli.Command{
		Name:  "plan",
		Usage: "print what apply would do",
		Description: "viaduct compares /etc/viaduct/host.yaml and the files of /etc/viaduct/host.d with the host and " +
			"prints what `apply` would do, refusals first; `--steps` prints the writes in their order. It " +
			"changes nothing. Exit status: 0 there is nothing to do; 4 there is something to do, or something " +
			"cannot be done.\n\n" +
			"Examples:\n  viaduct plan\n" +
			"  viaduct plan -f host.yaml --json",
		Flags: append(o.flags(e), e.stepsFlag("the plan", nil)),
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usagef("plan takes no arguments: it plans everything that is declared")
			}
			return runPlan(e, &o, e.declaredByFile, e.printPlan)
		},
	})
}

func statusCommand(e *env) *cli.Command {
	var o declaredOptions
	return command(&cli.Command{
		Name:  "status",
		Usage: "report differences from the declared configuration",
		Description: "viaduct prints one line for each declared device: ok, differs, missing, refused, changed " +
			"(there is another device now than when it was last applied), or unknown (a captured host does not show " +
			"what it takes to compare). A device that has VFs or is on a vfio driver " +
			"without being declared is unmanaged. Exit status: 0 the host is as declared; 4 it is not, or that is " +
			"not known.\n\nExamples:\n  viaduct status\n" +
			"  viaduct status --json",
		Flags: append(o.flags(e), &cli.BoolFlag{
			Name: "verbose", Aliases: []string{"v"}, Usage: "also what is different", Destination: &e.verbose,
		}),
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usagef("status takes no arguments: it reports everything that is declared")
			}
			return runPlan(e, &o, e.declaredInForce, e.printStatus)
		},
	})
}

// choice says which declaration is compared with the host, of what was read.
type choice func(m *declared.Manager, o *declaredOptions, s *hostfile.Host, wrong error) (*hostfile.Host, error)

// declaredByFile is what the next apply goes by: what was read. That something else is in force is told.
func (e *env) declaredByFile(m *declared.Manager, o *declaredOptions, s *hostfile.Host,
	wrong error) (*hostfile.Host, error) {
	if wrong != nil || o.file != "" {
		return s, wrong
	}
	use, err := m.InForce(s, nil)
	if err != nil {
		return nil, err
	}
	if use.Why != "" {
		e.note("this is what the next apply does; %s", use.Why)
	}
	return s, nil
}

// declaredInForce is what a boot and the watch service go by.
func (e *env) declaredInForce(m *declared.Manager, o *declaredOptions, s *hostfile.Host,
	wrong error) (*hostfile.Host, error) {
	if o.file != "" {
		return s, wrong
	}
	use, err := m.InForce(s, wrong)
	if err != nil {
		return nil, err
	}
	if !lease.BookOf(m.Host()).Known() {
		e.note("which declaration is in force was not captured of this host: it is taken for that of its files")
	}
	if wrong != nil {
		e.note("%v", wrong)
	}
	if use.Why != "" {
		e.note("%s", use.Why)
	}
	if use.Held {
		e.note("viaduct leaves the host alone until the next apply: the last one was undone, or was of another file")
	}
	return use.Host, nil
}

// runPlan is plan and status: they differ in what they compare with the host, and in what they print.
func runPlan(e *env, o *declaredOptions, choose choice, show func(*declared.Manager, []*declared.Item) error) error {
	h, err := e.open()
	if err != nil {
		return err
	}
	defer h.Close()
	var s *hostfile.Host
	var wrong error
	read := make(chan struct{})
	go func() {
		// Beside the scan: of ten thousand VFs it takes as long.
		defer close(read)
		s, wrong = o.load(h)
	}()
	e.dryRun = true
	var m *declared.Manager
	b, err := e.openHandle(h, 0)
	if err == nil {
		defer b.Close()
		m, err = o.manager(e, b)
	}
	<-read
	if wrong != nil {
		wrong = usageError{wrong}
	}
	if err != nil {
		return errors.Join(wrong, err)
	}

	if s, err = choose(m, o, s, wrong); err != nil {
		return err
	}
	items, err := m.Plan(s)
	if err != nil {
		return err
	}
	if holder.Known(h) {
		m.Check(items)
	}
	return show(m, items)
}

// itemView is one declared device in plan and status --json.
type itemView struct {
	Selector string         `json:"selector"`
	At       string         `json:"at"`
	Address  *string        `json:"address"`
	State    declared.State `json:"state"`
	Optional bool           `json:"optional"`
	Why      *string        `json:"why"`
	Steps    []string       `json:"steps"`
	Writes   []writeView    `json:"writes"`
	Notes    []string       `json:"notes"`
	Refusals []refusalView  `json:"refusals"`
}

func viewItem(i *declared.Item) itemView {
	v := itemView{
		Selector: i.Name, At: i.At.String(), State: i.State, Optional: i.Optional,
		Notes: append([]string{}, i.Notes...), Refusals: viewRefusals(i.Err),
	}
	v.Steps, v.Writes = viewSteps(i.Steps)
	if i.Device != nil {
		v.Address = &i.Device.Name
	}
	if i.Err != nil {
		text := i.Err.Error()
		v.Why = &text
	}
	return v
}

// differs is what plan and status end with. A device that may be missing, and is, is no difference.
func differs(items []*declared.Item) error {
	for _, i := range items {
		if i.Wrong() {
			return errDiffers
		}
	}
	return nil
}

func (e *env) printItems(items []*declared.Item) error {
	views := []itemView{}
	for _, i := range items {
		views = append(views, viewItem(i))
	}
	e.printJSON(views)
	return differs(items)
}

func itemName(i *declared.Item) string {
	if i.Device == nil || i.Device.Name == i.Name {
		return i.Name
	}
	return i.Device.Name + " (" + i.Name + ")"
}

func (e *env) printPlan(_ *declared.Manager, items []*declared.Item) error {
	if e.json {
		return e.printItems(items)
	}
	e.preview(previewItems(items))
	if len(items) == 0 {
		e.note("nothing is declared in /%s or /%s: viaduct adopt writes a file that describes this host", hostfile.File,
			hostfile.Dir)
	}
	return differs(items)
}

// filesOf are the files that items are declared in, in their order.
func filesOf(items []*declared.Item) []string {
	var out []string
	for _, i := range items {
		if i.At.File != "" && !slices.Contains(out, i.At.File) {
			out = append(out, i.At.File)
		}
	}
	return out
}

func (e *env) printStatus(m *declared.Manager, items []*declared.Item) error {
	for _, d := range m.Unmanaged(items) {
		items = append(items, &declared.Item{Name: d.Name, Device: d, State: declared.Unmanaged, Optional: true})
	}
	if e.json {
		return e.printItems(items)
	}
	e.statusWords(items, e.verbose)
	return differs(slices.DeleteFunc(items, func(i *declared.Item) bool { return i.State == declared.Unmanaged }))
}
