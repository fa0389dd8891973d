//go:build lab

package kube

// kubeconfigText: the authority, the address, the token.
const kubeconfigText = `apiVersion: v1
kind: Config
clusters: [{name: lab, cluster: {certificate-authority: %s, server: "https://%s"}}]
users: [{name: user, user: {token: %s}}]
contexts: [{name: lab, context: {cluster: lab, user: user}}]
current-context: lab
`

// runtimeConfig: the state's folder, twice, and that of the programs. The score of the OOM killer may not be lowered on
// every machine.
const runtimeConfig = `version = 3
root = '%s/containerd'
state = '/run/containerd'
disabled_plugins = ['io.containerd.nri.v1.nri']

[plugins.'io.containerd.cri.v1.images']
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = '` + image + `'

[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    conf_dir = '%s/cni'
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = 'io.containerd.runc.v2'
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      BinaryName = '%s/runc'
      SystemdCgroup = false
`

// noNetwork makes the node ready. All pods have the host's network: no plugin is ever called.
const noNetwork = `{"cniVersion": "1.0.0", "name": "none", "plugins": [{"type": "none"}]}`

// kubeletConfig: the cgroup for pods, and containerd's socket, twice. The kubelet takes no notice of how much memory
// and disk the host has left. What it could not prepare it tries again when it looks at the pod the next time, which is
// every minute by default.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 127.0.0.1
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}}
authorization: {mode: Webhook}
cgroupDriver: cgroupfs
cgroupRoot: %s
enforceNodeAllocatable: [pods]
evictionHard: {memory.available: "0%%"}
failCgroupV1: false
failSwapOn: false
containerRuntimeEndpoint: unix://%s
imageServiceEndpoint: unix://%s
nodeStatusUpdateFrequency: 20s
syncFrequency: 5s
nodeLeaseDurationSeconds: 240
shutdownGracePeriod: 0s
`
