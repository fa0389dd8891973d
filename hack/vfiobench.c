/*
 * What package vfio is measured against (hack/vfiobench, by hack/bench vfio): the bare system calls of a device's use
 * through VFIO. It prints a line a measure, times in nanoseconds:
 *
 *	map-4k, unmap-4k    1 GiB of ordinary pages in one ioctl: the best of 5, and all
 *	map-2m, unmap-2m    the same of huge pages, of which vm.nr_hugepages has to have set 512 aside: the best of 25
 *	mmio-read32         a 32-bit read of BAR 0 at 0: of 100 times 1,000, the median
 *	interrupt           from the write that makes an edu device raise its MSI until its eventfd was waited for and read:
 *	                    the median
 *	interrupt-loopback  the same for other devices, whose vector 0 the kernel is asked to trigger
 *
 * Which CPU gets the interrupt matters more than all else: set /proc/irq/default_smp_affinity, and run it with taskset.
 *
 * Usage: vfiobench ADDRESS iommufd|container [INTERRUPTS [MIB]], 2,000 and 1,024 unless given. The device is on
 * vfio-pci, and no other of its group on a driver of the host's. It is compiled with -I $(hack/uapi-check --headers).
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/iommufd.h>
#include <linux/vfio.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
	ROUNDS = 5,
	ROUNDS_HUGE = 25, /* which take less long */
	READS = 1000,
	TIMES_READ = 100,
	WARM_UP = 100,
	PAGE = 4096,
	COMMAND = 4, /* in the configuration space */
	COMMAND_MEMORY = 2,
	COMMAND_MASTER = 4,
	EDU_RAISE = 0x60,
	EDU_ACKNOWLEDGE = 0x64,
};
static uint64_t length;
static const uint64_t iova = 1ull << 32; /* beyond the window of MSIs */

static int iommufd = -1; /* the way: /dev/iommu, or -1 */
static uint32_t ioas;	 /* there */
static int container = -1;
static int device;

static _Noreturn void fail(const char *what)
{
	errx(1, "%s: %s (%s)", what, strerror(errno), strerrorname_np(errno));
}

static int call(int fd, unsigned long request, const char *name, void *argument)
{
	int result = ioctl(fd, request, argument);
	if (result < 0)
		fail(name);
	return result;
}
#define CALL(fd, request, argument) call(fd, request, #request, argument)

static int open_or_fail(const char *path)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		fail(path);
	return fd;
}

static int64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static void open_iommufd(const char *address)
{
	char path[PATH_MAX], node[PATH_MAX] = "";
	snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/vfio-dev", address);
	DIR *d = opendir(path);
	if (!d)
		fail(path);
	for (struct dirent *e; (e = readdir(d));)
		if (e->d_name[0] != '.')
			snprintf(node, sizeof node, "/dev/vfio/devices/%s", e->d_name);
	closedir(d);
	device = open_or_fail(node);
	iommufd = open_or_fail("/dev/iommu");
	struct vfio_device_bind_iommufd bind = {.argsz = sizeof bind, .iommufd = iommufd};
	CALL(device, VFIO_DEVICE_BIND_IOMMUFD, &bind);
	struct iommu_ioas_alloc alloc = {.size = sizeof alloc};
	CALL(iommufd, IOMMU_IOAS_ALLOC, &alloc);
	ioas = alloc.out_ioas_id;
	struct vfio_device_attach_iommufd_pt attach = {.argsz = sizeof attach, .pt_id = ioas};
	CALL(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach);
}

static void open_container(const char *address)
{
	char path[PATH_MAX], target[PATH_MAX], node[PATH_MAX];
	snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/iommu_group", address);
	ssize_t n = readlink(path, target, sizeof target - 1);
	if (n < 0)
		fail(path);
	target[n] = 0;
	snprintf(node, sizeof node, "/dev/vfio/%.20s", strrchr(target, '/') + 1);
	container = open_or_fail("/dev/vfio/vfio");
	if (CALL(container, VFIO_GET_API_VERSION, NULL) != VFIO_API_VERSION)
		errx(1, "VFIO_GET_API_VERSION: not %d", VFIO_API_VERSION);
	if (CALL(container, VFIO_CHECK_EXTENSION, (void *)VFIO_TYPE1v2_IOMMU) != 1)
		errx(1, "VFIO_CHECK_EXTENSION: no VFIO_TYPE1v2_IOMMU");
	int group = open_or_fail(node);
	struct vfio_group_status status = {.argsz = sizeof status};
	CALL(group, VFIO_GROUP_GET_STATUS, &status);
	if (!(status.flags & VFIO_GROUP_FLAGS_VIABLE))
		errx(1, "VFIO_GROUP_GET_STATUS: the group is not viable");
	CALL(group, VFIO_GROUP_SET_CONTAINER, &container);
	CALL(container, VFIO_SET_IOMMU, (void *)VFIO_TYPE1v2_IOMMU);
	device = CALL(group, VFIO_GROUP_GET_DEVICE_FD, (void *)address);
}

static void map(void *memory)
{
	if (iommufd >= 0) {
		struct iommu_ioas_map m = {
			.size = sizeof m,
			.flags = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE | IOMMU_IOAS_MAP_WRITEABLE,
			.ioas_id = ioas,
			.user_va = (uintptr_t)memory,
			.length = length,
			.iova = iova,
		};
		CALL(iommufd, IOMMU_IOAS_MAP, &m);
	} else {
		struct vfio_iommu_type1_dma_map m = {
			.argsz = sizeof m,
			.flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
			.vaddr = (uintptr_t)memory,
			.iova = iova,
			.size = length,
		};
		CALL(container, VFIO_IOMMU_MAP_DMA, &m);
	}
}

static void unmap(void)
{
	uint64_t unmapped;
	if (iommufd >= 0) {
		struct iommu_ioas_unmap u = {.size = sizeof u, .ioas_id = ioas, .iova = iova, .length = length};
		CALL(iommufd, IOMMU_IOAS_UNMAP, &u);
		unmapped = u.length;
	} else {
		struct vfio_iommu_type1_dma_unmap u = {.argsz = sizeof u, .iova = iova, .size = length};
		CALL(container, VFIO_IOMMU_UNMAP_DMA, &u);
		unmapped = u.size;
	}
	if (unmapped != length)
		errx(1, "unmapped %llu bytes instead of %llu", (unsigned long long)unmapped, (unsigned long long)length);
}

/* memory makes what is mapped, of huge pages or without any, and touches each page of it. */
static char *memory(int huge)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | (huge ? MAP_HUGETLB | 21 << MAP_HUGE_SHIFT : 0);
	char *m = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, -1, 0);
	if (m == MAP_FAILED)
		fail(huge ? "mmap of huge pages" : "mmap");
	/* A kernel without transparent huge pages says EINVAL. */
	if (!huge && madvise(m, length, MADV_NOHUGEPAGE) && errno != EINVAL)
		fail("madvise");
	for (uint64_t i = 0; i < length; i += PAGE)
		m[i] = 1;
	return m;
}

static void line(const char *name, const char *of, const int64_t *values, int n)
{
	int64_t best = values[0];
	for (int i = 1; i < n; i++)
		if (values[i] < best)
			best = values[i];
	printf("%s-%s %lld", name, of, (long long)best);
	for (int i = 0; i < n; i++)
		printf(" %lld", (long long)values[i]);
	puts("");
}

static void measure_memory(const char *of, int huge, int rounds)
{
	int64_t mapping[ROUNDS_HUGE], unmapping[ROUNDS_HUGE];
	char *m = memory(huge);
	for (int i = 0; i < rounds; i++) {
		int64_t start = now();
		map(m);
		int64_t mapped = now();
		unmap();
		unmapping[i] = now() - mapped;
		mapping[i] = mapped - start;
	}
	munmap(m, length);
	line("map", of, mapping, rounds);
	line("unmap", of, unmapping, rounds);
}

static struct vfio_region_info region(uint32_t index)
{
	struct vfio_region_info r = {.argsz = sizeof r, .index = index};
	CALL(device, VFIO_DEVICE_GET_REGION_INFO, &r);
	return r;
}

static volatile uint32_t *map_bar(void)
{
	struct vfio_region_info r = region(VFIO_PCI_BAR0_REGION_INDEX);
	if (!(r.flags & VFIO_REGION_INFO_FLAG_MMAP))
		errx(1, "BAR 0 cannot be mapped");
	void *bar = mmap(NULL, r.size, PROT_READ | PROT_WRITE, MAP_SHARED, device, r.offset);
	if (bar == MAP_FAILED)
		fail("mmap of BAR 0");
	return bar;
}

static int compare(const void *a, const void *b)
{
	int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
	return (x > y) - (x < y);
}

static void measure_reads(volatile uint32_t *bar)
{
	int64_t times[TIMES_READ];
	for (int i = 0; i < TIMES_READ; i++) {
		int64_t start = now();
		for (int j = 0; j < READS; j++)
			(void)bar[0];
		times[i] = now() - start;
	}
	qsort(times, TIMES_READ, sizeof *times, compare);
	printf("mmio-read32 %.1f\n", (double)times[TIMES_READ / 2] / READS);
}

/* let_it_work has the device do DMA, which an MSI is as well, and returns its ids: at open the kernel forbids it. */
static uint32_t let_it_work(void)
{
	struct vfio_region_info r = region(VFIO_PCI_CONFIG_REGION_INDEX);
	uint32_t ids;
	uint16_t command;
	if (pread(device, &ids, sizeof ids, r.offset) != sizeof ids ||
	    pread(device, &command, sizeof command, r.offset + COMMAND) != sizeof command)
		fail("pread of the configuration space");
	command |= COMMAND_MEMORY | COMMAND_MASTER;
	if (pwrite(device, &command, sizeof command, r.offset + COMMAND) != sizeof command)
		fail("pwrite of the configuration space");
	return ids;
}

/* message_index is MSI-X, or MSI if the device has no MSI-X. */
static uint32_t message_index(void)
{
	static const uint32_t indexes[] = {VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX};
	for (size_t i = 0; i < sizeof indexes / sizeof *indexes; i++) {
		struct vfio_irq_info info = {.argsz = sizeof info, .index = indexes[i]};
		CALL(device, VFIO_DEVICE_GET_IRQ_INFO, &info);
		if (info.count > 0)
			return indexes[i];
	}
	errx(1, "the device has neither MSI nor MSI-X");
}

static void measure_interrupts(volatile uint32_t *bar, int edu, int count)
{
	int64_t *times = calloc(count, sizeof *times);
	int event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), epoll = epoll_create1(EPOLL_CLOEXEC);
	struct epoll_event wanted = {.events = EPOLLIN}, got;
	if (!times || event < 0 || epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, event, &wanted))
		fail("eventfd and epoll");

	union {
		struct vfio_irq_set set;
		char bytes[sizeof(struct vfio_irq_set) + sizeof(int32_t)];
	} on = {.set = {
		.argsz = sizeof on,
		.flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
		.index = message_index(),
		.count = 1,
	}};
	memcpy(on.set.data, &event, sizeof event);
	CALL(device, VFIO_DEVICE_SET_IRQS, &on);
	struct vfio_irq_set trigger = {
		.argsz = sizeof trigger,
		.flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER,
		.index = on.set.index,
		.count = 1,
	};

	for (int i = -WARM_UP; i < count; i++) {
		int64_t start = now();
		if (edu)
			bar[EDU_RAISE / 4] = 1;
		else
			CALL(device, VFIO_DEVICE_SET_IRQS, &trigger);
		int n = epoll_wait(epoll, &got, 1, 10000);
		if (n < 0)
			fail("epoll_wait");
		if (n == 0)
			errx(1, "no interrupt in 10 s");
		uint64_t value;
		if (read(event, &value, sizeof value) != sizeof value)
			fail("read of the eventfd");
		int64_t end = now();
		if (value != 1)
			errx(1, "%llu interrupts for one", (unsigned long long)value);
		if (edu)
			bar[EDU_ACKNOWLEDGE / 4] = 1;
		if (i >= 0)
			times[i] = end - start;
	}
	qsort(times, count, sizeof *times, compare);
	printf("%s %lld\n", edu ? "interrupt" : "interrupt-loopback", (long long)times[count / 2]);
	free(times);
}

int main(int argc, char **argv)
{
	int count = argc > 3 ? atoi(argv[3]) : 2000, mib = argc > 4 ? atoi(argv[4]) : 1024;
	if (argc < 3 || argc > 5 || count < 1 || mib < 2 || (strcmp(argv[2], "iommufd") && strcmp(argv[2], "container")))
		errx(2, "usage: vfiobench ADDRESS iommufd|container [INTERRUPTS [MIB]]");
	length = (uint64_t)mib << 20;
	if (strcmp(argv[2], "iommufd"))
		open_container(argv[1]);
	else
		open_iommufd(argv[1]);
	measure_memory("4k", 0, ROUNDS);
	measure_memory("2m", 1, ROUNDS_HUGE);
	int edu = let_it_work() == 0x11e81234;
	volatile uint32_t *bar = map_bar();
	measure_reads(bar);
	measure_interrupts(bar, edu, count);
	return 0;
}
