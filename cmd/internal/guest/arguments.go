package guest

import (
	"strconv"
	"strings"
)

// MemoryOf is how much memory a VMM was started with, by its command line: QEMU's -m, which counts in MiB without a
// unit, and Cloud Hypervisor's and crosvm's --memory and --mem; 0 if it does not say.
func MemoryOf(arguments []string) uint64 {
	for i, a := range arguments {
		name, value, joined := strings.Cut(a, "=")
		switch a {
		case "-m", "--memory", "--mem":
			if i+1 == len(arguments) {
				return 0
			}
			value = arguments[i+1]
		default:
			if !joined || name != "--memory" && name != "--mem" {
				continue
			}
		}
		for option := range strings.SplitSeq(value, ",") {
			if key, size, keyed := strings.Cut(option, "="); !keyed {
				return sizeOf(option)
			} else if key == "size" {
				return sizeOf(size)
			}
		}
	}
	return 0
}

// sizeOf reads a size with a unit, MiB without one; 0 if it is none.
func sizeOf(s string) uint64 {
	number, shift := s, 20
	if i := strings.IndexAny(s, "BKMGTbkmgt"); i == len(s)-1 && i > 0 {
		number, shift = s[:i], map[byte]int{'B': 0, 'K': 10, 'M': 20, 'G': 30, 'T': 40}[strings.ToUpper(s)[i]]
	}
	n, err := strconv.ParseUint(number, 10, 64)
	if err != nil || n<<shift>>shift != n {
		return 0
	}
	return n << shift
}
