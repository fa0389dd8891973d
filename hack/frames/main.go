// Command frames prints the Ethernet frames of a capture (the classic pcap format), a line each: source, VLAN or
// "untagged".
package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("frames: ")
	if len(os.Args) != 2 {
		log.Fatal("usage: frames FILE.pcap")
	}
	b, err := os.ReadFile(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	if err := frames(b, os.Stdout); err != nil {
		log.Fatal(err)
	}
}

const (
	magic      = 0xa1b2c3d4
	fileHead   = 24
	recordHead = 16
	ethernet   = 14
)

func frames(b []byte, w io.Writer) error {
	if len(b) < fileHead || binary.LittleEndian.Uint32(b) != magic {
		return errors.New("no capture of the classic format")
	}
	for b = b[fileHead:]; len(b) >= recordHead; {
		n := int(binary.LittleEndian.Uint32(b[8:]))
		if b = b[recordHead:]; n > len(b) {
			return nil // the host was ended in the middle of one
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

		if _, err := fmt.Fprintf(w, "%s %s\n", net.HardwareAddr(f[6:12]), tag); err != nil {
			return err
		}
	}
	return nil
}
