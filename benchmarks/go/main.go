// The workloads in Go: `bench WORKLOAD COUNT` prints a line of JSON with seconds of wall and CPU time.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"
)

const (
	batch = 100
	chain = 1000
	fan   = 10
)

func passBuffered(capacity int) func(int) {
	return func(count int) {
		channel := make(chan int, capacity)
		go func() {
			for i := 0; i < count; i++ {
				channel <- i
			}
		}()
		for i := 0; i < count; i++ {
			<-channel
		}
	}
}

func iterate(count int) {
	channel := make(chan int, 1000)
	go func() {
		for i := 0; i < count; i++ {
			channel <- i
		}
		close(channel)
	}()
	for range channel {
	}
}

func pingPong(count int) {
	there, back := make(chan int), make(chan int)
	go func() {
		for i := 0; i < count; i++ {
			back <- <-there
		}
	}()
	for i := 0; i < count; i++ {
		there <- i
		<-back
	}
}

// Go sends slices where it sends batches.
func passBatches(count int) {
	channel := make(chan []int, 10)
	items := make([]int, batch)
	go func() {
		for i := 0; i < count/batch; i++ {
			channel <- append([]int(nil), items...)
		}
	}()
	for i := 0; i < count/batch; i++ {
		<-channel
	}
}

func fanIn(count int) {
	channel := make(chan int, 100)
	for i := 0; i < fan; i++ {
		go func() {
			for j := 0; j < count/fan; j++ {
				channel <- j
			}
		}()
	}
	for i := 0; i < count/fan*fan; i++ {
		<-channel
	}
}

func fanOut(count int) {
	channel := make(chan int, 100)
	var receivers sync.WaitGroup
	receivers.Add(fan)
	for i := 0; i < fan; i++ {
		go func() {
			defer receivers.Done()
			for range channel {
			}
		}()
	}
	for i := 0; i < count; i++ {
		channel <- i
	}
	close(channel)
	receivers.Wait()
}

func daisyChain(count int) {
	for i := 0; i < max(count/chain, 1); i++ {
		leftmost := make(chan int)
		right := leftmost
		for j := 0; j < chain; j++ {
			left := right
			right = make(chan int)
			go func(left, right chan int) { left <- 1 + <-right }(left, right)
		}
		go func(right chan int) { right <- 1 }(right)
		<-leftmost
	}
}

func selectReady2(count int) {
	a, b := make(chan int, 1), make(chan int, 1)
	a <- 1
	b <- 1
	for i := 0; i < count; i++ {
		select {
		case <-a:
			a <- 1
		case <-b:
			b <- 1
		}
	}
}

func selectReady10(count int) {
	var c [10]chan int
	for i := range c {
		c[i] = make(chan int, 1)
		c[i] <- 1
	}
	for i := 0; i < count; i++ {
		select {
		case <-c[0]:
			c[0] <- 1
		case <-c[1]:
			c[1] <- 1
		case <-c[2]:
			c[2] <- 1
		case <-c[3]:
			c[3] <- 1
		case <-c[4]:
			c[4] <- 1
		case <-c[5]:
			c[5] <- 1
		case <-c[6]:
			c[6] <- 1
		case <-c[7]:
			c[7] <- 1
		case <-c[8]:
			c[8] <- 1
		case <-c[9]:
			c[9] <- 1
		}
	}
}

func selectIdle(count int) {
	channels := [2]chan int{make(chan int), make(chan int)}
	acknowledged := make(chan int)
	go func() {
		for i := 0; i < count; i++ {
			channels[i&1] <- 1
			<-acknowledged
		}
	}()
	for i := 0; i < count; i++ {
		select {
		case <-channels[0]:
		case <-channels[1]:
		}
		acknowledged <- 1
	}
}

type job struct {
	number int
	result chan int
}

func pool(workers int, work func(int) int) func(int) {
	return func(count int) {
		jobs := make(chan job, 100)
		for i := 0; i < workers; i++ {
			go func() {
				for job := range jobs {
					job.result <- work(job.number)
				}
			}()
		}
		results := make([]chan int, count)
		for i := range results {
			results[i] = make(chan int, 1)
			jobs <- job{i, results[i]}
		}
		close(jobs)
		for _, result := range results {
			<-result
		}
	}
}

func doNothing(number int) int { return number }

func sleep(number int) int {
	time.Sleep(time.Millisecond)
	return number
}

var workloads = map[string]func(int){
	"buffered-1":      passBuffered(1),
	"buffered-100":    passBuffered(100),
	"buffered-1000":   passBuffered(1000),
	"async-for":       iterate,
	"ping-pong":       pingPong,
	"batches":         passBatches,
	"fan-in":          fanIn,
	"fan-out":         fanOut,
	"daisy-chain":     daisyChain,
	"select-2-ready":  selectReady2,
	"select-10-ready": selectReady10,
	"select-2-idle":   selectIdle,
	"workers-no-op":   pool(10, doNothing),
	"workers-sleep":   pool(1000, sleep),
}

func cpuSeconds() float64 {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		panic(err)
	}
	total := time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	return total.Seconds()
}

func main() {
	run, known := workloads[os.Args[1]]
	count, err := strconv.Atoi(os.Args[2])
	if !known || err != nil {
		fmt.Fprintln(os.Stderr, "usage: bench WORKLOAD COUNT")
		os.Exit(2)
	}
	run(max(count/50, 1))
	cpu, start := cpuSeconds(), time.Now()
	run(count)
	wall := time.Since(start).Seconds()
	line, _ := json.Marshal(map[string]float64{"wall": wall, "cpu": cpuSeconds() - cpu})
	fmt.Println(string(line))
}
