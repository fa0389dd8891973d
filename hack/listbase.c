/*
 * What `viaduct list` is measured against: the least work that finds the same facts. It makes the same system calls, one
 * after the other, keeps what it reads in arrays, and prints a line a device, its group's first, in the order of groups.
 * Names are not looked up. Usage: listbase ROOT, where links in ROOT/sys must be relative, as the kernel's are.
 */
#define _GNU_SOURCE /* O_PATH */
#include <err.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

struct device {
	uint64_t address; /* domain, bus, device, function */
	char name[20], driver[32], override[32], netdev[16];
	unsigned vendor, device, class;
	int node, group, total, vfs, index, owner; /* index among the VFs of owner, -1 if it is none */
	int first; /* a PF's first VF in vfs[] */
};

struct group {
	int id;
	char type[16];
};

static struct device *devices;
static struct group *groups;
static uint64_t *vfs;
static int n_devices, n_groups, n_vfs;

/* The list, with room for one more. */
static void *grown(void *list, int n, size_t size)
{
	if (n & (n - 1) || (n && n < 64)) /* doubled whenever it is full */
		return list;
	list = realloc(list, (n ? n * 2 : 64) * size);
	if (!list)
		err(1, "memory");
	return list;
}

/* An attribute without its newline; its length, or -1 when there is none. */
static int attribute(int dir, const char *name, char *to, int size)
{
	int n, fd = openat(dir, name, O_RDONLY | O_CLOEXEC | O_NOCTTY);
	if (fd < 0)
		return -1;
	n = read(fd, to, size - 1);
	close(fd);
	if (n > 0 && to[n - 1] == '\n')
		n--;
	if (n >= 0)
		to[n] = 0;
	return n;
}

static int link_target(int dir, const char *name, char *to, int size)
{
	int n = readlinkat(dir, name, to, size - 1);
	if (n >= 0)
		to[n] = 0;
	return n;
}

static const char *base(const char *path)
{
	const char *slash = strrchr(path, '/');
	return slash ? slash + 1 : path;
}

static uint64_t parse(const char *s) /* 0000:01:10.0; 0 is no address, so one is added */
{
	unsigned domain, bus, slot, function;
	char *end;
	domain = strtoul(s, &end, 16);
	if (end == s || *end != ':')
		return 0;
	bus = strtoul(end + 1, &end, 16);
	if (*end != ':')
		return 0;
	slot = strtoul(end + 1, &end, 16);
	if (*end != '.')
		return 0;
	function = strtoul(end + 1, &end, 16);
	return *end ? 0 : ((uint64_t)domain << 16 | bus << 8 | slot << 3 | function) + 1;
}

static int by_address(const void *a, const void *b)
{
	const struct device *x = a, *y = b;
	return (x->address > y->address) - (x->address < y->address);
}

static int by_id(const void *a, const void *b) { return ((const struct group *)a)->id - ((const struct group *)b)->id; }

static struct device *find(uint64_t address)
{
	struct device key = { .address = address };
	return address ? bsearch(&key, devices, n_devices, sizeof key, by_address) : NULL;
}

/* Calls each for every name in a directory; the buffer is as large as viaduct's, so that there are as many calls. */
static int names(int dir, const char *path, int (*each)(int fd, const char *name))
{
	struct entry { uint64_t ino, off; unsigned short len; unsigned char type; char name[]; } *e;
	_Alignas(8) char page[4096];
	int n, at, fd = openat(dir, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOCTTY);
	if (fd < 0)
		return -1;
	while ((n = syscall(SYS_getdents64, fd, page, sizeof page)) > 0)
		for (at = 0; at < n; at += e->len) {
			e = (struct entry *)(page + at);
			if (strcmp(e->name, ".") && strcmp(e->name, "..") && each(fd, e->name)) {
				close(fd);
				return 1;
			}
		}
	close(fd);
	return 0;
}

static int read_device(int parent, const char *name)
{
	char text[4096], key[16];
	struct device *d;
	int i, dir = openat(parent, name, O_PATH | O_DIRECTORY | O_CLOEXEC | O_NOCTTY);
	if (dir < 0)
		return 0;
	devices = grown(devices, n_devices, sizeof *devices);
	d = &devices[n_devices];
	memset(d, 0, sizeof *d);
	snprintf(d->name, sizeof d->name, "%s", name);
	d->address = parse(name);
	d->group = d->index = d->owner = d->node = -1;
	if (link_target(dir, "driver", text, sizeof text) > 0)
		snprintf(d->driver, sizeof d->driver, "%s", base(text));
	if (attribute(dir, "driver_override", text, sizeof text) > 0 && strcmp(text, "(null)"))
		snprintf(d->override, sizeof d->override, "%s", text);
	if (attribute(dir, "numa_node", text, sizeof text) > 0)
		d->node = atoi(text);
	if (attribute(dir, "sriov_totalvfs", text, sizeof text) > 0) {
		d->total = atoi(text);
		d->first = n_vfs;
		for (i = 0; i < d->total; i++) {
			snprintf(key, sizeof key, "virtfn%d", i);
			if (link_target(dir, key, text, sizeof text) < 0)
				break;
			vfs = grown(vfs, n_vfs, sizeof *vfs);
			vfs[n_vfs++] = parse(base(text));
		}
		d->vfs = i;
	}
	if (attribute(dir, "modalias", text, sizeof text) > 0) {
		unsigned sv, sd, bc, sc, pi;
		if (sscanf(text, "pci:v%8Xd%8Xsv%8Xsd%8Xbc%2Xsc%2Xi%2X", &d->vendor, &d->device, &sv, &sd, &bc, &sc, &pi) == 7) {
			d->class = bc << 16 | sc << 8 | pi;
			n_devices++;
		}
	}
	close(dir);
	return 0;
}

static int read_netdev(int dir, const char *name)
{
	char text[4096], *slash;
	struct device *d;
	if (link_target(dir, name, text, sizeof text) < 0)
		return 0;
	for (;;) { /* the device nearest to the end */
		if ((d = find(parse(base(text)))))
			snprintf(d->netdev, sizeof d->netdev, "%s", name);
		slash = strrchr(text, '/');
		if (d || !slash)
			return 0;
		*slash = 0;
	}
}

static int read_member(int dir, const char *name)
{
	struct device *d = find(parse(name));
	(void)dir;
	if (d)
		d->group = groups[n_groups].id;
	return 0;
}

static int read_group(int parent, const char *name)
{
	int dir = openat(parent, name, O_PATH | O_DIRECTORY | O_CLOEXEC | O_NOCTTY);
	if (dir < 0)
		return 0;
	groups = grown(groups, n_groups, sizeof *groups);
	groups[n_groups].id = atoi(name);
	if (attribute(dir, "type", groups[n_groups].type, sizeof groups->type) < 0)
		groups[n_groups].type[0] = 0;
	names(dir, "devices", read_member);
	n_groups++;
	close(dir);
	return 0;
}

static int read_unit(int dir, const char *name)
{
	(void)dir;
	printf("# unit %s\n", name);
	return 0;
}

static int read_irq(int dir, const char *name)
{
	char file[288], chip[4096];
	snprintf(file, sizeof file, "%s/chip_name", name);
	if (attribute(dir, file, chip, sizeof chip) < 0 || !(strstr(chip, "IO-APIC") || !strncmp(chip, "IR-", 3)))
		return 0;
	printf("# interrupt remapping %d\n", !strncmp(chip, "IR-", 3));
	return 1;
}

static int by_group(const void *a, const void *b)
{
	const struct device *x = a, *y = b;
	return x->group != y->group ? (unsigned)x->group < (unsigned)y->group ? -1 : 1 : by_address(a, b);
}

int main(int argc, char **argv)
{
	static char out[65536];
	int i, j, root = open(argc > 1 ? argv[1] : "/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	struct device *d;
	struct group *g, key;
	if (root < 0)
		err(1, "%s", argv[1]);
	setvbuf(stdout, out, _IOFBF, sizeof out);
	if (names(root, "sys/bus/pci/devices", read_device) < 0)
		err(1, "sys/bus/pci/devices");
	qsort(devices, n_devices, sizeof *devices, by_address);
	names(root, "sys/class/iommu", read_unit);
	names(root, "sys/kernel/irq", read_irq);
	names(root, "sys/class/net", read_netdev);
	for (i = 0; i < n_devices; i++)
		for (j = 0; j < devices[i].vfs; j++)
			if ((d = find(vfs[devices[i].first + j]))) {
				d->owner = i;
				d->index = j;
			}
	names(root, "sys/kernel/iommu_groups", read_group);
	qsort(groups, n_groups, sizeof *groups, by_id);
	qsort(devices, n_devices, sizeof *devices, by_group);
	for (i = 0; i < n_devices; i++) {
		d = &devices[i];
		key.id = d->group;
		g = d->group < 0 ? NULL : bsearch(&key, groups, n_groups, sizeof key, by_id);
		if (g)
			printf("%d %s", g->id, *g->type ? g->type : "-");
		else
			printf("- -");
		printf(" %s %04x:%04x %04x %s %s %d %s", d->name, d->vendor, d->device, d->class >> 8, *d->driver ? d->driver : "-",
			*d->override ? d->override : "-", d->node, *d->netdev ? d->netdev : "-");
		if (d->total)
			printf(" %d/%d\n", d->vfs, d->total);
		else if (d->index >= 0)
			printf(" vf%d\n", d->index);
		else
			printf(" -\n");
	}
	return fflush(stdout) || ferror(stdout);
}
