{{/* Labels of everything. */}}
{{- define "container.labels" -}}
{{ include "container.podLabels" . }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 }}
{{- end }}

{{/* Labels of the pod: not the chart's version, so that a new version restarts only what it changes. */}}
{{- define "container.podLabels" -}}
{{ include "container.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: cluster-code
cluster-code.io/instance: {{ .Values.instance | quote }}
{{- with .Values.project }}
cluster-code.io/project: {{ . | quote }}
{{- end }}
{{- with .Values.user }}
cluster-code.io/user: {{ include "container.text" . | quote }}
{{- end }}
{{- end }}

{{/* What the Deployment finds its pods by: never changes in the life of a release. */}}
{{- define "container.selector" -}}
app.kubernetes.io/name: dev-container
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* How a probe asks whether the container is well. */}}
{{- define "container.probe" -}}
{{- if .Values.health -}}
httpGet:
  path: {{ .Values.health | quote }}
  port: http
{{- else -}}
tcpSocket:
  port: http
{{- end }}
timeoutSeconds: 5
{{- end }}

{{/* A quantity as a number of bytes. */}}
{{- define "container.bytes" -}}
{{- $text := toString . -}}
{{- $unit := regexFind "[A-Za-z]+$" $text -}}
{{- $sizes := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- mulf (trimSuffix $unit $text | float64) (get $sizes $unit | float64) | int64 }}
{{- end }}

{{/* A value as text: whole numbers without an exponent. */}}
{{- define "container.text" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) }}{{ int64 . }}{{ else }}{{ . }}{{ end }}
{{- end }}
