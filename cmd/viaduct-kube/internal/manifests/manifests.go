// Package manifests has what a cluster needs to give functions to its pods: device classes, access rights, a policy
// and a daemon set.
package manifests

import (
	"io"
	"text/template"
)

// Options are what manifests are made of.
type Options struct {
	Driver, Namespace, Image, KubeletDir, CDIDir string
	Pools                                        []string
}

// Print prints manifests as YAML.
func Print(w io.Writer, o *Options) error { return all.Execute(w, o) }

// all is all that a cluster needs. What the driver may do there: read the claims of pods, say what its own node has,
// and tell events. A policy keeps it from what other nodes have. On the node it is privileged, as a container runtime
// lets no other container open VFIO's nodes, by which it is proved that nobody has a function and that it is clean; it
// needs the host's processes to see who uses a device, and the host's network to configure VFs.
var all = template.Must(template.New("manifests").Parse(`apiVersion: v1
kind: Namespace
metadata:
  name: {{.Namespace}}
---
apiVersion: resource.k8s.io/v1
kind: DeviceClass
metadata:
  name: {{.Driver}}
spec:
  selectors:
    - cel:
        expression: device.driver == "{{.Driver}}"
{{- range .Pools}}
---
apiVersion: resource.k8s.io/v1
kind: DeviceClass
metadata:
  name: {{.}}.{{$.Driver}}
spec:
  extendedResourceName: {{$.Driver}}/{{.}}
  selectors:
    - cel:
        expression: device.driver == "{{$.Driver}}" && device.attributes["{{$.Driver}}"].pool == "{{.}}"
{{- end}}
---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: viaduct-kube
  namespace: {{.Namespace}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: viaduct-kube
rules:
  - apiGroups: [resource.k8s.io]
    resources: [resourceclaims]
    verbs: [get]
  - apiGroups: [resource.k8s.io]
    resources: [resourceslices]
    verbs: [get, list, watch, create, update, patch, delete]
  - apiGroups: [""]
    resources: [nodes]
    verbs: [get]
  - apiGroups: [""]
    resources: [events]
    verbs: [create, patch]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: viaduct-kube
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: viaduct-kube
subjects:
  - kind: ServiceAccount
    name: viaduct-kube
    namespace: {{.Namespace}}
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata:
  name: viaduct-kube
spec:
  failurePolicy: Fail
  matchConstraints:
    resourceRules:
      - apiGroups: [resource.k8s.io]
        apiVersions: [v1]
        operations: [CREATE, UPDATE, DELETE]
        resources: [resourceslices]
  matchConditions:
    - name: driver
      expression: request.userInfo.username == "system:serviceaccount:{{.Namespace}}:viaduct-kube"
  variables:
    - name: node
      expression: request.userInfo.extra[?"authentication.kubernetes.io/node-name"][0].orValue("")
    - name: slice
      expression: 'request.operation == "DELETE" ? oldObject : object'
  validations:
    - expression: variables.node != ""
      message: the service account has no node, so it is not bound to a pod
    - expression: variables.slice.spec.?nodeName.orValue("") == variables.node
      messageExpression: '"viaduct-kube on node " + variables.node + " may write only what that node has"'
    - expression: variables.slice.spec.driver == "{{.Driver}}"
      message: viaduct-kube may write only what its own driver has
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata:
  name: viaduct-kube
spec:
  policyName: viaduct-kube
  validationActions: [Deny]
---
apiVersion: apps/v1
kind: DaemonSet
metadata:
  name: viaduct-kube
  namespace: {{.Namespace}}
  labels: {app: viaduct-kube}
spec:
  selector:
    matchLabels: {app: viaduct-kube}
  updateStrategy:
    type: RollingUpdate
    rollingUpdate: {maxSurge: 1, maxUnavailable: 0}
  template:
    metadata:
      labels: {app: viaduct-kube}
    spec:
      serviceAccountName: viaduct-kube
      priorityClassName: system-node-critical
      hostPID: true
      hostNetwork: true
      dnsPolicy: ClusterFirstWithHostNet
      tolerations:
        - operator: Exists
      containers:
        - name: viaduct-kube
          image: {{.Image}}
          args: [serve, --driver={{.Driver}}, --kubelet-dir={{.KubeletDir}}, --cdi-dir={{.CDIDir}}]
          env:
            - name: NODE_NAME
              valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
            - name: POD_UID
              valueFrom: {fieldRef: {fieldPath: metadata.uid}}
          resources:
            requests: {cpu: 20m, memory: 64Mi}
          securityContext:
            # No other container may open the nodes of VFIO.
            privileged: true
            readOnlyRootFilesystem: true
            runAsUser: 0
          volumeMounts:
            - {name: sys, mountPath: /sys}
            - {name: dev, mountPath: /dev}
            - {name: etc, mountPath: /etc/viaduct, readOnly: true}
            - {name: run, mountPath: /run/viaduct}
            - {name: udev, mountPath: /run/udev}
            - {name: state, mountPath: /var/lib/viaduct}
            - {name: modules, mountPath: /lib/modules, readOnly: true}
            - {name: kubelet, mountPath: {{.KubeletDir}}}
            - {name: cdi, mountPath: {{.CDIDir}}}
      volumes:
        - {name: sys, hostPath: {path: /sys, type: Directory}}
        - {name: dev, hostPath: {path: /dev, type: Directory}}
        - {name: etc, hostPath: {path: /etc/viaduct, type: Directory}}
        - {name: run, hostPath: {path: /run/viaduct, type: DirectoryOrCreate}}
        - {name: udev, hostPath: {path: /run/udev, type: DirectoryOrCreate}}
        - {name: state, hostPath: {path: /var/lib/viaduct, type: DirectoryOrCreate}}
        - {name: modules, hostPath: {path: /lib/modules, type: DirectoryOrCreate}}
        - {name: kubelet, hostPath: {path: {{.KubeletDir}}, type: Directory}}
        - {name: cdi, hostPath: {path: {{.CDIDir}}, type: DirectoryOrCreate}}
`))
