// Reads manifests from standard input and fails unless each is an object that a cluster would take: of a known kind, with
// no unknown or repeated fields and no wrong types. It knows the types of Kubernetes; of other projects' objects it knows
// what is written here.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"

	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
	strict "sigs.k8s.io/yaml"
)

type object struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
}

// VolumeSnapshotClass and VolumeGroupSnapshotClass have the same fields.
type snapshotClass struct {
	object         `json:",inline"`
	Driver         string            `json:"driver"`
	DeletionPolicy string            `json:"deletionPolicy"`
	Parameters     map[string]string `json:"parameters"`
}

type metadataService struct {
	object `json:",inline"`
	Spec   struct {
		Address  string `json:"address"`
		Audience string `json:"audience"`
		CACert   string `json:"caCert"`
	} `json:"spec"`
}

type podMonitor struct {
	object `json:",inline"`
	Spec   struct {
		Selector            metav1.LabelSelector `json:"selector"`
		PodMetricsEndpoints []struct {
			Port string `json:"port"`
		} `json:"podMetricsEndpoints"`
	} `json:"spec"`
}

type reference struct {
	Kind string `json:"kind"`
	Name string `json:"name"`
}

type issuer struct {
	object `json:",inline"`
	Spec   struct {
		SelfSigned *struct{} `json:"selfSigned"`
		CA         *struct {
			SecretName string `json:"secretName"`
		} `json:"ca"`
	} `json:"spec"`
}

type certificate struct {
	object `json:",inline"`
	Spec   struct {
		IsCA       bool            `json:"isCA"`
		CommonName string          `json:"commonName"`
		SecretName string          `json:"secretName"`
		DNSNames   []string        `json:"dnsNames"`
		Usages     []string        `json:"usages"`
		Duration   metav1.Duration `json:"duration"`
		IssuerRef  reference       `json:"issuerRef"`
		PrivateKey struct {
			Algorithm      string `json:"algorithm"`
			Size           int    `json:"size"`
			RotationPolicy string `json:"rotationPolicy"`
		} `json:"privateKey"`
	} `json:"spec"`
}

var foreign = map[string]func() any{
	"snapshot.storage.k8s.io/v1/VolumeSnapshotClass":                func() any { return &snapshotClass{} },
	"groupsnapshot.storage.k8s.io/v1beta1/VolumeGroupSnapshotClass": func() any { return &snapshotClass{} },
	"groupsnapshot.storage.k8s.io/v1beta2/VolumeGroupSnapshotClass": func() any { return &snapshotClass{} },
	"cbt.storage.k8s.io/v1beta1/SnapshotMetadataService":            func() any { return &metadataService{} },
	"monitoring.coreos.com/v1/PodMonitor":                           func() any { return &podMonitor{} },
	"cert-manager.io/v1/Issuer":                                     func() any { return &issuer{} },
	"cert-manager.io/v1/Certificate":                                func() any { return &certificate{} },
}

func main() {
	count, failed := 0, false
	seen := map[string]bool{}
	documents := yaml.NewYAMLReader(bufio.NewReader(os.Stdin))
	for {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			fail(err)
		}
		var head object
		if err := strict.Unmarshal(document, &head); err != nil {
			fail(err)
		}
		if head.Kind == "" {
			continue // Only comments.
		}
		count++
		name := fmt.Sprintf("%s %s %s/%s", head.APIVersion, head.Kind, head.Namespace, head.Name)
		if err := check(document, head); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
			failed = true
		}
		if seen[name] || head.Name == "" {
			fmt.Fprintf(os.Stderr, "%s: there are two of this name, or it has none\n", name)
			failed = true
		}
		seen[name] = true
	}
	if failed || count == 0 {
		fail(fmt.Errorf("%d objects were read, and not all are good", count))
	}
	fmt.Printf("%d objects are good\n", count)
}

func check(document []byte, head object) error {
	if make, ok := foreign[head.APIVersion+"/"+head.Kind]; ok {
		return strict.UnmarshalStrict(document, make())
	}
	kind := schema.FromAPIVersionAndKind(head.APIVersion, head.Kind)
	if !scheme.Scheme.Recognizes(kind) {
		return errors.New("this kind is not known")
	}
	reader := json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme.Scheme, scheme.Scheme,
		json.SerializerOptions{Yaml: true, Strict: true})
	decoded, _, err := reader.Decode(document, &kind, nil)
	if err != nil {
		return err
	}
	switch workload := decoded.(type) {
	case *apps.Deployment:
		return checkPod(workload.Spec.Selector, workload.Spec.Template)
	case *apps.DaemonSet:
		return checkPod(workload.Spec.Selector, workload.Spec.Template)
	}
	return nil
}

// What a cluster refuses although the types are right.
func checkPod(selector *metav1.LabelSelector, pod core.PodTemplateSpec) error {
	for key, value := range selector.MatchLabels {
		if pod.Labels[key] != value {
			return fmt.Errorf("the pod has no label %s=%s", key, value)
		}
	}
	volumes, containers := map[string]bool{}, map[string]bool{}
	for _, volume := range pod.Spec.Volumes {
		if volumes[volume.Name] {
			return fmt.Errorf("there are two volumes %s", volume.Name)
		}
		volumes[volume.Name] = true
	}
	used := map[string]bool{}
	for _, container := range append(pod.Spec.InitContainers, pod.Spec.Containers...) {
		if containers[container.Name] {
			return fmt.Errorf("there are two containers %s", container.Name)
		}
		containers[container.Name] = true
		for _, mount := range container.VolumeMounts {
			if !volumes[mount.Name] {
				return fmt.Errorf("%s mounts %s, which is no volume", container.Name, mount.Name)
			}
			used[mount.Name] = true
			privileged := container.SecurityContext.Privileged
			if mount.MountPropagation != nil && *mount.MountPropagation == core.MountPropagationBidirectional &&
				(privileged == nil || !*privileged) {
				return fmt.Errorf("%s must be privileged to pass mounts on", container.Name)
			}
		}
		ports := map[string]bool{}
		for _, port := range container.Ports {
			ports[port.Name] = true
		}
		for _, probe := range []*core.Probe{container.LivenessProbe, container.ReadinessProbe} {
			if probe != nil && !ports[probe.HTTPGet.Port.String()] {
				return fmt.Errorf("%s is probed at a port that it has not", container.Name)
			}
		}
	}
	if len(used) != len(volumes) {
		return fmt.Errorf("of %d volumes %d are mounted", len(volumes), len(used))
	}
	return nil
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}
