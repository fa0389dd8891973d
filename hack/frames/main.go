// Command frames prints the Ethernet frames of a capture (the classic pcap format), a line each: source, VLAN or
// "untagged".
//
// With -from MAC it takes captures of several places by one clock, and prints at which of them frames of that source
// came by, in the order of time: a line for each change, with how many there were.
package main

import (
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("frames: ")
	from := flag.String("from", "", "only of this `MAC` address, in runs at a place")
	flag.Parse()
	if flag.NArg() == 0 || *from == "" && flag.NArg() > 1 {
		log.Fatal("usage: frames FILE.pcap, or frames -from MAC FILE.pcap...")
	}
	var all []frame
	for _, name := range flag.Args() {
		b, err := os.ReadFile(name)
		if err != nil {
			log.Fatal(err)
		}
		some, err := frames(b, strings.TrimSuffix(filepath.Base(name), ".pcap"))
		if err != nil {
			log.Fatalf("%s: %v", name, err)
		}
		all = append(all, some...)
	}
	if *from != "" {
		runs(all, *from, os.Stdout)
		return
	}
	for _, f := range all {
		fmt.Println(f.source, f.tag)
	}
}

// frame is one frame of a capture.
type frame struct {
	at          time.Duration
	place       string
	source, tag string
}

const (
	magic      = 0xa1b2c3d4
	fileHead   = 24
	recordHead = 16
	ethernet   = 14
)

func frames(b []byte, place string) ([]frame, error) {
	if len(b) < fileHead || binary.LittleEndian.Uint32(b) != magic {
		return nil, errors.New("no capture of the classic format")
	}
	var all []frame
	for b = b[fileHead:]; len(b) >= recordHead; {
		at := time.Duration(binary.LittleEndian.Uint32(b))*time.Second +
			time.Duration(binary.LittleEndian.Uint32(b[4:]))*time.Microsecond
		n := int(binary.LittleEndian.Uint32(b[8:]))
		if b = b[recordHead:]; n > len(b) {
			return all, nil // the host was ended in the middle of one
		}
		f := b[:n]
		b = b[n:]
		if len(f) < ethernet+4 {
			continue
		}
		tag := "untagged"
		switch binary.BigEndian.Uint16(f[12:]) {
		case 0x8100:
			tag = fmt.Sprintf("vlan %d", binary.BigEndian.Uint16(f[14:])&0xfff)
		case 0x88a8:
			tag = fmt.Sprintf("802.1ad vlan %d", binary.BigEndian.Uint16(f[14:])&0xfff)
		}
		all = append(all, frame{at, place, net.HardwareAddr(f[6:12]).String(), tag})
	}
	return all, nil
}

// runs prints at which place frames of a source came by, a line for each time that it was another one.
func runs(all []frame, from string, w io.Writer) {
	all = slices.DeleteFunc(all, func(f frame) bool { return f.source != from })
	slices.SortStableFunc(all, func(a, b frame) int { return int(a.at - b.at) })
	for len(all) > 0 {
		n := slices.IndexFunc(all, func(f frame) bool { return f.place != all[0].place })
		if n < 0 {
			n = len(all)
		}
		took := all[n-1].at - all[0].at
		_, _ = fmt.Fprintf(w, "%s: %d frames in %s\n", all[0].place, n, took.Round(time.Millisecond))
		all = all[n:]
	}
}
