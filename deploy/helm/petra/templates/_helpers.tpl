{{- define "petra.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "petra.pool" -}}
{{ .Values.pool.directory }}/pool
{{- end }}

{{/* Whole seconds: a number from a file of values may be shown as 6e+02. */}}
{{- define "petra.patience" -}}
{{- $seconds := .Values.patience | toString -}}
{{- if kindIs "float64" .Values.patience }}{{ $seconds = printf "%.0f" .Values.patience }}{{ end -}}
{{- if not (regexMatch "^[0-9]{1,9}$" $seconds) }}{{ fail "patience: a whole number of seconds" }}{{ end -}}
{{ $seconds }}
{{- end }}

{{- define "petra.labels" -}}
app.kubernetes.io/name: petra
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{/* Labels that select the pods of a component; never change them. */}}
{{- define "petra.selector" -}}
app.kubernetes.io/name: petra
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* What every petra-csi is started with. */}}
{{- define "petra.arguments" -}}
{{- if not .Values.repositories }}{{ fail "repositories: at least one is needed" }}{{ end -}}
{{- range .Values.repositories }}
- {{ printf "--repository=%s=%s" .name .url | quote }}
{{- end }}
- --metrics=0.0.0.0:{{ .Values.metrics.port }}
- --log-format={{ .Values.log.format }}
{{- end }}

{{- define "petra.environment" -}}
- name: PETRA_LOG
  value: {{ .Values.log.filter | quote }}
{{- end }}

{{- define "petra.credentials" -}}
{{- with .Values.credentialsSecret }}
envFrom:
  - secretRef:
      name: {{ . }}
{{- end }}
{{- end }}

{{/* The files that --agent-tls wants, from a secret as cert-manager makes it. */}}
{{- define "petra.tlsVolume" -}}
- name: agent-tls
  secret:
    secretName: {{ . }}
    defaultMode: 0400
    items:
      - {key: ca.crt, path: ca.pem}
      - {key: tls.crt, path: cert.pem}
      - {key: tls.key, path: key.pem}
{{- end }}

{{/* A sidecar that may do nothing but talk. */}}
{{- define "petra.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Probes of petra-csi: lives while the liveness probe's calls are answered, is ready when its own page says so. */}}
{{- define "petra.probes" -}}
livenessProbe:
  httpGet: {path: /healthz, port: liveness}
  initialDelaySeconds: 20
  periodSeconds: 20
  timeoutSeconds: 10
  failureThreshold: 5
readinessProbe:
  httpGet: {path: /readyz, port: metrics}
  periodSeconds: 10
  timeoutSeconds: 10
{{- end }}

{{- define "petra.livenessSidecar" -}}
- name: liveness-probe
  image: {{ .Values.sidecars.livenessProbe }}
  args: [--csi-address=/csi/csi.sock, --health-port=9808, --probe-timeout=8s]
  securityContext:
    {{- include "petra.sidecarSecurity" . | nindent 4 }}
  volumeMounts:
    - {name: socket, mountPath: /csi}
  resources:
    {{- toYaml .Values.sidecars.resources | nindent 4 }}
{{- end }}

{{/* On nodes the socket belongs to a privileged container: with SELinux, only this type may connect. */}}
{{- define "petra.sidecarSecurity" -}}
{{ include "petra.restricted" . }}
{{- if eq .Values.role "all" }}
seLinuxOptions: {type: spc_t}
{{- end }}
{{- end }}

{{/* The sidecars that turn objects of the cluster into calls of the controller. */}}
{{- define "petra.controllerSidecars" -}}
{{- $common := list "--csi-address=/csi/csi.sock" (printf "--timeout=%s" .Values.controller.timeout) "--leader-election" (printf "--leader-election-namespace=%s" .Release.Namespace) -}}
- name: provisioner
  image: {{ .Values.sidecars.provisioner }}
  args:
    {{- toYaml $common | nindent 4 }}
    # Names of claims, for experiments and runs.
    - --extra-create-metadata
    # A volume is on one node: the one that was chosen for the pod.
    - --strict-topology
    - --feature-gates=Topology=true
    # Says how much room each node has.
    - --enable-capacity
    - --capacity-ownerref-level={{ if eq .Values.role "all" }}1{{ else }}2{{ end }}
    - --retry-interval-max=30s
  env:
    - name: NAMESPACE
      valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
    - name: POD_NAME
      valueFrom: {fieldRef: {fieldPath: metadata.name}}
  securityContext:
    {{- include "petra.sidecarSecurity" . | nindent 4 }}
  volumeMounts:
    - {name: socket, mountPath: /csi}
  resources:
    {{- toYaml .Values.sidecars.resources | nindent 4 }}
- name: snapshotter
  image: {{ .Values.sidecars.snapshotter }}
  args:
    {{- toYaml $common | nindent 4 }}
    - --extra-create-metadata
    {{- if .Values.groupSnapshotClass.create }}
    - --feature-gates=CSIVolumeGroupSnapshot=true
    {{- end }}
    - --retry-interval-max=30s
  securityContext:
    {{- include "petra.sidecarSecurity" . | nindent 4 }}
  volumeMounts:
    - {name: socket, mountPath: /csi}
  resources:
    {{- toYaml .Values.sidecars.resources | nindent 4 }}
- name: resizer
  image: {{ .Values.sidecars.resizer }}
  args:
    {{- toYaml $common | nindent 4 }}
    - --retry-interval-max=30s
    - --handle-volume-inuse-error=false
  securityContext:
    {{- include "petra.sidecarSecurity" . | nindent 4 }}
  volumeMounts:
    - {name: socket, mountPath: /csi}
  resources:
    {{- toYaml .Values.sidecars.resources | nindent 4 }}
{{- if .Values.snapshotMetadata.enabled }}
- name: snapshot-metadata
  image: {{ .Values.sidecars.snapshotMetadata }}
  args: [--csi-address=/csi/csi.sock, --tls-cert=/tls/tls.crt, --tls-key=/tls/tls.key, --port=50051]
  ports:
    - {name: snapmeta, containerPort: 50051}
  securityContext:
    {{- include "petra.sidecarSecurity" . | nindent 4 }}
  volumeMounts:
    - {name: socket, mountPath: /csi}
    - {name: snapshot-metadata-tls, mountPath: /tls, readOnly: true}
  resources:
    {{- toYaml .Values.sidecars.resources | nindent 4 }}
{{- end }}
{{- end }}
