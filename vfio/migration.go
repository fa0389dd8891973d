package vfio

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"viaduct/internal/uapi"
)

// Migration is what a device can of having its state moved to another one.
type Migration struct {
	StopCopy bool // its state can be saved while it is stopped; a device that cannot do that cannot be moved
	P2P      bool // it can be kept from reaching other devices, before all are stopped
	PreCopy  bool // its state can be saved while it runs
}

// Migration tells what the device's driver can. It is an ErrUnsupported if it cannot save the state of the device, as
// plain vfio-pci cannot.
func (d *Device) Migration() (Migration, error) {
	var m uapi.VfioDeviceFeatureMigration
	if err := getFeature(d, uapi.VFIO_DEVICE_FEATURE_MIGRATION, &m); err != nil {
		return Migration{}, err
	}
	has := func(flag uint64) bool { return m.Flags&flag != 0 }
	return Migration{
		has(uapi.VFIO_MIGRATION_STOP_COPY), has(uapi.VFIO_MIGRATION_P2P), has(uapi.VFIO_MIGRATION_PRE_COPY),
	}, nil
}

// State is a state of a device that can be migrated.
type State uint32

// The states (enum vfio_device_mig_state in linux/vfio.h).
const (
	// StateError is what a failed change of state can leave: [Device.Reset] leads to StateRunning.
	StateError State = uapi.VFIO_DEVICE_STATE_ERROR
	// StateStop is a device that changes neither itself nor memory.
	StateStop State = uapi.VFIO_DEVICE_STATE_STOP
	// StateRunning is a device that works.
	StateRunning State = uapi.VFIO_DEVICE_STATE_RUNNING
	// StateStopCopy is a stopped device, whose state is read from a Stream, to its end.
	StateStopCopy State = uapi.VFIO_DEVICE_STATE_STOP_COPY
	// StateResuming is a stopped device, whose state is written to a Stream; going to StateStop has it taken.
	StateResuming State = uapi.VFIO_DEVICE_STATE_RESUMING
	// StateRunningP2P is a device that works, but begins no access to other devices.
	StateRunningP2P State = uapi.VFIO_DEVICE_STATE_RUNNING_P2P
	// StatePreCopy is a device that works, while its state is read from a Stream.
	StatePreCopy State = uapi.VFIO_DEVICE_STATE_PRE_COPY
	// StatePreCopyP2P is both.
	StatePreCopyP2P State = uapi.VFIO_DEVICE_STATE_PRE_COPY_P2P
)

// String is the state's name, as in the kernel's header.
func (s State) String() string {
	names := []string{"ERROR", "STOP", "RUNNING", "STOP_COPY", "RESUMING", "RUNNING_P2P", "PRE_COPY", "PRE_COPY_P2P"}
	if int(s) < len(names) {
		return names[s]
	}
	return fmt.Sprintf("state %d", uint32(s))
}

// has reports whether a device that can m has a state.
func (m Migration) has(s State) bool {
	switch s {
	case StateRunningP2P:
		return m.P2P
	case StatePreCopy:
		return m.PreCopy
	case StatePreCopyP2P:
		return m.PreCopy && m.P2P
	default:
		return s <= StatePreCopyP2P
	}
}

// next says, for a state and the one that is to be reached, which one is entered next (vfio_mig_get_next_state in
// drivers/vfio/vfio_main.c); StateError is where there is no way.
var next = [...][8]State{
	StateError: {},
	StateStop: {
		StateStop: StateStop, StateRunning: StateRunningP2P, StateStopCopy: StateStopCopy,
		StateResuming: StateResuming, StateRunningP2P: StateRunningP2P, StatePreCopy: StateRunningP2P,
		StatePreCopyP2P: StateRunningP2P,
	},
	StateRunning: {
		StateStop: StateRunningP2P, StateRunning: StateRunning, StateStopCopy: StateRunningP2P,
		StateResuming: StateRunningP2P, StateRunningP2P: StateRunningP2P, StatePreCopy: StatePreCopy,
		StatePreCopyP2P: StateRunningP2P,
	},
	StatePreCopy: {
		StateStop: StateRunning, StateRunning: StateRunning, StateStopCopy: StatePreCopyP2P,
		StateResuming: StateRunning, StateRunningP2P: StateRunning, StatePreCopy: StatePreCopy,
		StatePreCopyP2P: StatePreCopyP2P,
	},
	StatePreCopyP2P: {
		StateStop: StateRunningP2P, StateRunning: StateRunningP2P, StateStopCopy: StateStopCopy,
		StateResuming: StateRunningP2P, StateRunningP2P: StateRunningP2P, StatePreCopy: StatePreCopy,
		StatePreCopyP2P: StatePreCopyP2P,
	},
	StateStopCopy: {
		StateStop: StateStop, StateRunning: StateStop, StateStopCopy: StateStopCopy, StateResuming: StateStop,
		StateRunningP2P: StateStop,
	},
	StateResuming: {
		StateStop: StateStop, StateRunning: StateStop, StateStopCopy: StateStop, StateResuming: StateResuming,
		StateRunningP2P: StateStop, StatePreCopy: StateStop, StatePreCopyP2P: StateStop,
	},
	StateRunningP2P: {
		StateStop: StateStop, StateRunning: StateRunning, StateStopCopy: StateStop, StateResuming: StateStop,
		StateRunningP2P: StateRunningP2P, StatePreCopy: StateRunning, StatePreCopyP2P: StatePreCopyP2P,
	},
}

// Path is the states that the kernel leads a device through from one to another, without the first: those that it can.
// It is an ErrRefused if there is no way.
func (m Migration) Path(from, to State) ([]State, error) {
	if from > StatePreCopyP2P || to > StatePreCopyP2P || !m.has(from) || !m.has(to) {
		return nil, fmt.Errorf("vfio: a device without such a state cannot go from %s to %s: %w", from, to, ErrRefused)
	}
	var path []State
	for at := from; at != to; {
		at = next[at][to]
		if at == StateError {
			return nil, fmt.Errorf("vfio: there is no way from %s to %s: %w", from, to, ErrRefused)
		}
		if m.has(at) {
			path = append(path, at)
		}
	}
	return path, nil
}

// State asks for the device's state.
func (d *Device) State() (State, error) {
	var s uapi.VfioDeviceFeatureMigState
	err := getFeature(d, uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, &s)
	return State(s.DeviceState), err
}

// stateMeans are what errnos of a change of state mean.
var stateMeans = map[unix.Errno]error{unix.EINVAL: ErrRefused}

// SetState brings the device into a state, through all those on the way: see [Migration.Path]. Where a saving or a
// resuming begins, it returns the Stream of it, which the caller closes; else nil. It is an ErrRefused if no way leads
// there, or the device does not take what was written to it. After an error it is in any state on the way, or in
// StateError: [Device.State] tells.
func (d *Device) SetState(to State) (*Stream, error) {
	s := uapi.VfioDeviceFeatureMigState{DeviceState: uint32(to), DataFd: -1}
	err := setFeature(d, uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, &s, stateMeans)
	if err != nil {
		return nil, fmt.Errorf("vfio: %s: to %s: %w", d.Name(), to, err)
	}
	if s.DataFd < 0 {
		return nil, nil
	}
	return newStream(d, int(s.DataFd))
}

// DataSize is how much memory the state of the device takes by an estimate of its driver, in bytes, when it is stopped.
// It is an ErrUnsupported if the driver tells none.
func (d *Device) DataSize() (uint64, error) {
	var s uapi.VfioDeviceFeatureMigDataSize
	err := getFeature(d, uapi.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, &s)
	return s.StopCopyLength, err
}

// recoverTo brings a device back to a state after a failure, and adds to the error if that fails too.
func (d *Device) recoverTo(to State, err error) error {
	now, failed := d.State()
	switch {
	case failed != nil:
	case now == StateError, now == StateResuming:
		// What it was sent is dropped by a reset alone.
		if failed = d.Reset(); failed == nil && to != StateRunning {
			_, failed = d.SetState(to)
		}
	case now != to:
		_, failed = d.SetState(to)
	}
	return errors.Join(err, failed)
}
