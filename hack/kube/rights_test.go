//go:build lab

package kube

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	authorization "k8s.io/api/authorization/v1"
	resource "k8s.io/api/resource/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

// rights are what the driver may do, by resource; all else is refused.
var rights = map[string]string{
	"resource.k8s.io/resourceclaims": "get",
	"resource.k8s.io/resourceslices": "create delete get list patch update watch",
	"/nodes":                         "get",
	"/events":                        "create patch",
	// What each account may ask of its own rights.
	"authorization.k8s.io/selfsubjectaccessreviews": "create",
	"authorization.k8s.io/selfsubjectrulesreviews":  "create",
	"authentication.k8s.io/selfsubjectreviews":      "create",
	// What the cluster lets each account read (system:cluster-trust-bundle-discovery).
	"certificates.k8s.io/clustertrustbundles": "get list watch",
}

var verbs = []string{"create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"}

// TestRights: the driver's service account may do what is written here with each resource that the API server has,
// and nothing else; and of slices it may write those of its own driver and node alone. All other tests show that it
// suffices.
func TestRights(t *testing.T) {
	installed(t)
	_, lists, err := up.client.Discovery().ServerGroupsAndResources()
	if err != nil {
		t.Fatal(err)
	}
	mine := accountClient(t)
	found := map[string]string{}
	for _, list := range lists {
		group, _, slashed := strings.Cut(list.GroupVersion, "/")
		if !slashed {
			group = ""
		}
		for _, r := range list.APIResources {
			name := group + "/" + r.Name
			if _, done := found[name]; done {
				continue
			}
			var may []string
			for _, verb := range verbs {
				resource, sub, _ := strings.Cut(r.Name, "/")
				review, err := mine.AuthorizationV1().SelfSubjectAccessReviews().Create(t.Context(),
					&authorization.SelfSubjectAccessReview{Spec: authorization.SelfSubjectAccessReviewSpec{
						ResourceAttributes: &authorization.ResourceAttributes{
							Group: group, Resource: resource, Subresource: sub, Verb: verb, Namespace: namespace,
						},
					}}, meta.CreateOptions{})
				if err != nil {
					t.Fatal(err)
				}
				if review.Status.Allowed {
					may = append(may, verb)
				}
			}
			found[name] = strings.Join(may, " ")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(found)) {
		if found[name] != rights[name] {
			t.Errorf("with %s it may do %q, want %q", name, found[name], rights[name])
		}
	}
	t.Logf("%d resources", len(found))

	for _, s := range []struct {
		name, driver, node string
		may                bool
	}{
		{"of-another-node", driverName, "other", false},
		{"of-another-driver", "other.test", node, false},
		{"its-own", driverName, node, true},
	} {
		_, err := mine.ResourceV1().ResourceSlices().Create(t.Context(), &resource.ResourceSlice{
			ObjectMeta: meta.ObjectMeta{Name: s.name},
			Spec: resource.ResourceSliceSpec{
				Driver: s.driver, NodeName: &s.node, Pool: resource.ResourcePool{Name: s.node, ResourceSliceCount: 1},
			},
		}, meta.CreateOptions{})
		if s.may && err != nil || !s.may && (err == nil || !strings.Contains(err.Error(), "viaduct-kube")) {
			t.Errorf("a slice %s: %v", s.name, err)
		}
		_ = up.client.ResourceV1().ResourceSlices().Delete(t.Context(), s.name, meta.DeleteOptions{})
	}
}

// accountClient is a client with the driver's rights.
func accountClient(t *testing.T) kubernetes.Interface {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", accountConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	config.QPS, config.Burst = 500, 1000
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(fmt.Errorf("the driver's account: %w", err))
	}
	return client
}
