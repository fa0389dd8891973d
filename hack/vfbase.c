/*
 * What `viaduct vf create PF... N mac=... vlan=... --driver vfio` is measured against: the bare kernel calls of that job, one after
 * the other, and the wait for the nodes. It asks nobody, checks nothing and remembers nothing. The PFs have no VFs, and are up.
 * Usage: vfbase N PF...; a PF is an address. VFs of a network interface get a MAC address and VLAN 100, those of an NVMe
 * controller two queues and an interrupt each.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/if_link.h>
#include <linux/netlink.h>
#include <linux/nvme_ioctl.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

static void put(const char *device, const char *file, const char *value)
{
	char path[PATH_MAX];
	snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/%s", device, file);
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, value, strlen(value)) < 0)
		err(1, "%s", path);
	close(fd);
}

/* only names the one entry of a directory of a device; false if there is none. */
static int only(const char *device, const char *dir, char *name)
{
	char path[PATH_MAX];
	struct dirent *e;
	snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/%s", device, dir);
	DIR *d = opendir(path);
	*name = 0;
	while (d && (e = readdir(d)))
		if (e->d_name[0] != '.')
			snprintf(name, 64, "%.63s", e->d_name);
	if (d)
		closedir(d);
	return *name != 0;
}

static struct rtattr *attr(struct nlmsghdr *h, int type, const void *data, int length)
{
	struct rtattr *a = (void *)((char *)h + NLMSG_ALIGN(h->nlmsg_len));
	a->rta_type = type;
	a->rta_len = RTA_LENGTH(length);
	if (length)
		memcpy(RTA_DATA(a), data, length);
	h->nlmsg_len = NLMSG_ALIGN(h->nlmsg_len) + RTA_ALIGN(a->rta_len);
	return a;
}

static void end(struct nlmsghdr *h, struct rtattr *a) { a->rta_len = (char *)h + h->nlmsg_len - (char *)a; }

static void set(int nl, int index, int type, const void *data, int length)
{
	char b[512] = { 0 };
	struct nlmsghdr *h = (void *)b;
	struct ifinfomsg i = { .ifi_index = index };
	*h = (struct nlmsghdr){ .nlmsg_len = NLMSG_LENGTH(sizeof i), .nlmsg_type = RTM_SETLINK, .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK };
	memcpy(NLMSG_DATA(h), &i, sizeof i);
	struct rtattr *list = attr(h, IFLA_VFINFO_LIST, 0, 0), *info = attr(h, IFLA_VF_INFO, 0, 0);
	attr(h, type, data, length);
	end(h, info);
	end(h, list);
	struct { struct nlmsghdr h; struct nlmsgerr e; char rest[4096]; } answer;
	if (send(nl, b, h->nlmsg_len, 0) < 0 || recv(nl, &answer, sizeof answer, 0) < 0)
		err(1, "netlink");
	if (answer.e.error)
		errx(1, "netlink: %s", strerror(-answer.e.error));
}

static void manage(int nvme, unsigned controller, unsigned action, unsigned resource, unsigned count)
{
	struct nvme_admin_cmd c = { .opcode = 0x1c, .cdw10 = action | resource << 8 | controller << 16, .cdw11 = count };
	int status = ioctl(nvme, NVME_IOCTL_ADMIN_CMD, &c);
	if (status < 0)
		err(1, "NVMe");
	if (status)
		errx(1, "NVMe status %#x", status);
}

int main(int argc, char **argv)
{
	char name[64], file[PATH_MAX], target[PATH_MAX];
	int count = argc > 2 ? atoi(argv[1]) : 0, nl = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
	for (int p = 2; p < argc; p++) {
		const char *pf = argv[p];
		int nvme = -1, index = 0;
		if (only(pf, "nvme", name)) {
			snprintf(file, sizeof file, "/dev/%s", name);
			nvme = open(file, O_RDONLY | O_CLOEXEC);
		} else if (only(pf, "net", name)) {
			index = if_nametoindex(name);
		}
		for (int i = 1; nvme >= 0 && i <= count; i++) {
			manage(nvme, i, 8, 0, 2);
			manage(nvme, i, 8, 1, 1);
		}
		put(pf, "sriov_drivers_autoprobe", "0");
		put(pf, "sriov_numvfs", argv[1]);
		for (int i = 0; i < count; i++) {
			struct ifla_vf_mac mac = { .vf = i, .mac = { 0x52, 0x54, 0, p, 0, i } };
			struct ifla_vf_vlan vlan = { .vf = i, .vlan = 100 };
			if (index) {
				set(nl, index, IFLA_VF_MAC, &mac, sizeof mac);
				set(nl, index, IFLA_VF_VLAN, &vlan, sizeof vlan);
			}
			if (nvme >= 0)
				manage(nvme, i + 1, 9, 0, 0);
			snprintf(file, sizeof file, "/sys/bus/pci/devices/%s/virtfn%d", pf, i);
			ssize_t n = readlink(file, target, sizeof target - 1);
			if (n < 0)
				err(1, "%s", file);
			target[n] = 0;
			char *vf = strrchr(target, '/') + 1;
			put(vf, "driver_override", "vfio-pci");
			put("..", "drivers_probe", vf);
		}
		put(pf, "sriov_drivers_autoprobe", "1");
		for (int i = 0; i < count; i++) {
			snprintf(file, sizeof file, "/sys/bus/pci/devices/%s/virtfn%d/iommu_group", pf, i);
			ssize_t n = readlink(file, target, sizeof target - 1);
			if (n < 0)
				err(1, "%s", file);
			target[n] = 0;
			snprintf(file, sizeof file, "/dev/vfio/%s", strrchr(target, '/') + 1);
			while (access(file, F_OK))
				usleep(100);
		}
	}
	return 0;
}
