/*
 * What `viaduct bind` and `unbind` are measured against: the bare writes, one after the other, and the wait for the nodes.
 * It asks nobody, checks nothing and remembers nothing. Usage: bindbase take|give ADDRESS...; devices without a driver only.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static void put(const char *file, const char *value)
{
	int fd = open(file, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, value, strlen(value)) < 0)
		err(1, "%s", file);
	close(fd);
}

int main(int argc, char **argv)
{
	char file[PATH_MAX], target[PATH_MAX], node[PATH_MAX + 16];
	int i, n, take = argc > 1 && !strcmp(argv[1], "take");
	for (i = 2; i < argc; i++) {
		snprintf(file, sizeof file, "/sys/bus/pci/devices/%s/driver_override", argv[i]);
		put(file, take ? "vfio-pci" : "none");
		put(take ? "/sys/bus/pci/drivers_probe" : "/sys/bus/pci/drivers/vfio-pci/unbind", argv[i]);
		if (!take)
			continue;
		snprintf(file, sizeof file, "/sys/bus/pci/devices/%s/iommu_group", argv[i]);
		n = readlink(file, target, sizeof target - 1);
		if (n < 0)
			err(1, "%s", file);
		target[n] = 0;
		snprintf(node, sizeof node, "/dev/vfio/%s", strrchr(target, '/') + 1);
		while (access(node, F_OK))
			usleep(100);
	}
	return 0;
}
