{{/* Labels of everything of one component: (list $ "gateway"). */}}
{{- define "cluster-code.labels" -}}
{{- $ := first . -}}
{{ include "cluster-code.selector" . }}
app.kubernetes.io/managed-by: {{ $.Release.Service }}
app.kubernetes.io/part-of: cluster-code
app.kubernetes.io/version: {{ $.Values.image.tag | default $.Chart.AppVersion | trunc 63 | quote }}
helm.sh/chart: {{ printf "%s-%s" $.Chart.Name $.Chart.Version | replace "+" "_" | trunc 63 }}
{{- end }}

{{/* What a Deployment finds its pods by, and what the policies of sessions let in. */}}
{{- define "cluster-code.selector" -}}
app.kubernetes.io/name: cluster-code
app.kubernetes.io/instance: {{ (first .).Release.Name }}
app.kubernetes.io/component: {{ last . }}
{{- end }}

{{- define "cluster-code.image" -}}
{{- printf "%s:%s" (required "image.repository: name the image of Cluster Code in your registry" .Values.image.repository) (.Values.image.tag | default .Chart.AppVersion) }}
{{- end }}

{{- define "cluster-code.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ .Values.serviceAccount.name | default (printf "%s-orchestrator" .Release.Name) }}
{{- else }}{{ .Values.serviceAccount.name | default "default" }}{{ end }}
{{- end }}

{{- define "cluster-code.secret" -}}
{{ .Values.existingSecret | default .Release.Name }}
{{- end }}

{{/* A value as text: whole numbers without an exponent. */}}
{{- define "cluster-code.text" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) }}{{ int64 . }}{{ else }}{{ . }}{{ end }}
{{- end }}

{{/* The settings of all processes, as lines of YAML. Only /tmp can be written to, and there is no Docker engine. */}}
{{- define "cluster-code.settings" -}}
{{- $settings := dict "HOST" "0.0.0.0" "PORT" "8080" "ORCHESTRATOR_HOST" "0.0.0.0" "ORCHESTRATOR_PORT" "8081" "LOG_FORMAT" "json" "DATA_DIR" "/tmp/data" "DEPLOY_DIR" "/tmp/deployments" "DEPLOY_CONCURRENCY" "0" }}
{{- if .Values.ingress.enabled }}{{ $_ := set $settings "TRUSTED_PROXIES" "1" }}{{ end }}
{{- range $name, $value := .Values.settings }}
{{- if hasKey $.Values.secrets $name }}
{{- fail (printf "settings.%s: this is a credential: put it under secrets, or into the Secret that existingSecret names" $name) }}
{{- end }}
{{- if has $name (list "HOST" "PORT" "ORCHESTRATOR_HOST" "ORCHESTRATOR_PORT") }}
{{- fail (printf "settings.%s: the chart sets it, since probes and Services go there" $name) }}
{{- end }}
{{- $_ := set $settings $name (include "cluster-code.text" $value) }}
{{- end }}
{{- range $name, $value := $settings }}
{{ $name }}: {{ $value | quote }}
{{- end }}
{{- end }}

{{/* The credentials that are given, as lines of YAML; those that must be there are asked for. */}}
{{- define "cluster-code.secrets" -}}
{{- $needed := list "DATABASE_URL" "AMQP_URL" }}
{{- if eq (.Values.settings.JWT_ALGORITHM | default "HS256") "HS256" }}{{ $needed = append $needed "JWT_SECRET" }}{{ end }}
{{- range $name := $needed }}
{{- $_ := required (printf "secrets.%s: set it, or name a Secret that has it with existingSecret" $name) (get $.Values.secrets $name) }}
{{- end }}
{{- range $name, $value := .Values.secrets }}
{{- if $value }}
{{ $name }}: {{ $value | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* Where settings come from; changes of what the chart holds start the pods anew. */}}
{{- define "cluster-code.envFrom" -}}
- configMapRef:
    name: {{ .Release.Name }}
- secretRef:
    name: {{ include "cluster-code.secret" . }}
{{- end }}
{{- define "cluster-code.checksums" -}}
checksum/settings: {{ include "cluster-code.settings" . | sha256sum }}
{{- if not .Values.existingSecret }}
checksum/secrets: {{ include "cluster-code.secrets" . | sha256sum }}
{{- end }}
{{- end }}

{{/* What the pods of both components have in common: (list $ "gateway"). */}}
{{- define "cluster-code.pod" -}}
{{- $ := first . }}
{{- $component := last . }}
{{- $values := get $.Values $component }}
enableServiceLinks: false
{{- with $.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if $values.affinity }}
affinity:
  {{- toYaml $values.affinity | nindent 2 }}
{{- else }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "cluster-code.selector" . | nindent 8 }}
{{- end }}
securityContext:
  {{- toYaml $.Values.podSecurityContext | nindent 2 }}
volumes:
  - name: tmp
    emptyDir:
      sizeLimit: {{ include "cluster-code.text" $.Values.tmpSize | quote }}
  {{- with $values.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* What their containers have in common, after `name`. */}}
{{- define "cluster-code.container" -}}
{{- $ := first . }}
{{- $values := get $.Values (last .) }}
image: {{ include "cluster-code.image" $ | quote }}
imagePullPolicy: {{ $.Values.image.pullPolicy }}
command:
  {{- toYaml $values.command | nindent 2 }}
{{- with $values.args }}
args:
  {{- toYaml . | nindent 2 }}
{{- end }}
envFrom:
  {{- include "cluster-code.envFrom" $ | nindent 2 }}
env:
  # Of Helm and its like, which keep caches in it.
  - name: HOME
    value: /tmp
  {{- with $values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
resources:
  {{- toYaml $values.resources | nindent 2 }}
securityContext:
  {{- toYaml $.Values.securityContext | nindent 2 }}
volumeMounts:
  - name: tmp
    mountPath: /tmp
  {{- with $values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* Who may evict a component's pods: (list $ "gateway"). */}}
{{- define "cluster-code.disruptionBudget" -}}
{{- $ := first . }}
{{- $component := last . }}
{{- with (get $.Values $component).disruptionBudget }}
{{- if .enabled }}
apiVersion: {{ ternary "policy/v1" "policy/v1beta1" (semverCompare ">=1.21-0" $.Capabilities.KubeVersion.Version) }}
kind: PodDisruptionBudget
metadata:
  name: {{ $.Release.Name }}-{{ $component }}
  namespace: {{ $.Release.Namespace }}
  labels:
    {{- include "cluster-code.labels" (list $ $component) | nindent 4 }}
spec:
  maxUnavailable: {{ .maxUnavailable }}
  selector:
    matchLabels:
      {{- include "cluster-code.selector" (list $ $component) | nindent 6 }}
{{- end }}
{{- end }}
{{- end }}

{{/* What the containers of the migration Job have in common, after `name` and `command`. */}}
{{- define "cluster-code.migrationContainer" -}}
image: {{ include "cluster-code.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
envFrom:
  - configMapRef:
      name: {{ .Release.Name }}-migration
  - secretRef:
      name: {{ .Values.existingSecret | default (printf "%s-migration" .Release.Name) }}
env:
  - name: HOME
    value: /tmp
resources:
  {{- toYaml .Values.migration.resources | nindent 2 }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
{{- end }}
