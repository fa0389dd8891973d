// Command timeit runs commands in turn, each as often as the others, and prints for each the median and the least wall
// time in milliseconds and the greatest resident size in KiB, separated by blanks:
//
//	timeit RUNS COMMAND...
//
// A command is one argument, split at blanks, in which {n} is the number of the round. One round beforehand is not
// counted. It stands beside the commands, in their chroot or their emulated host, so that nothing but their own start,
// work and end is measured. The resident size is never below timeit's own, which the kernel hands on across fork and
// exec.
package main

import (
	"bytes"
	"fmt"
	"log"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("timeit: ")
	if len(os.Args) < 3 {
		log.Fatal("usage: timeit RUNS COMMAND...")
	}
	runs, err := strconv.Atoi(os.Args[1])
	if err != nil || runs < 1 {
		log.Fatalf("%q is no number of runs", os.Args[1])
	}
	commands := os.Args[2:]
	times, rss := make([][]time.Duration, len(commands)), make([]int64, len(commands))
	for round := range runs + 1 {
		for i, c := range commands {
			argv := strings.Fields(strings.ReplaceAll(c, "{n}", strconv.Itoa(round)))
			var stderr bytes.Buffer
			cmd := exec.Command(argv[0], argv[1:]...)
			if round == 0 {
				cmd.Stderr = &stderr // without it in the other rounds, for which no pipe is to be made
			}
			start := time.Now()
			err := cmd.Run()
			took := time.Since(start)
			if err != nil {
				log.Fatalf("%s: %v\n%s", c, err, stderr.Bytes())
			}

			if round == 0 {
				continue
			}
			times[i] = append(times[i], took)
			rss[i] = max(rss[i], cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss)
		}
	}

	for i := range commands {
		slices.Sort(times[i])
		fmt.Printf("%.2f %.2f %d\n", ms(times[i][len(times[i])/2]), ms(times[i][0]), rss[i])
	}
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
