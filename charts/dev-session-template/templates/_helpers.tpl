{{/* Labels of everything. */}}
{{- define "session.labels" -}}
{{ include "session.podLabels" . }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 }}
{{- end }}

{{/* Labels of the pod: not the chart's version, so that a new version restarts only sessions that it changes. */}}
{{- define "session.podLabels" -}}
{{ include "session.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: cluster-code
cluster-code.io/instance: {{ .Values.instance | quote }}
cluster-code.io/project: {{ .Values.project | default .Release.Namespace | quote }}
{{- with .Values.session }}
cluster-code.io/session: {{ include "session.text" . | quote }}
{{- end }}
{{- end }}

{{/* What the Deployment finds its pods by: never changes in the life of a release. */}}
{{- define "session.selector" -}}
app.kubernetes.io/name: dev-session
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* The enabled services, in order, as {"names": [...]}. */}}
{{- define "session.services" -}}
{{- $names := list }}
{{- range $name := list "preview" "chat" "vscode" }}
{{- if (get $.Values.services $name).enabled }}{{ $names = append $names $name }}{{ end }}
{{- end }}
{{- dict "names" $names | toYaml }}
{{- end }}

{{/* A quantity as a number: of thousandths of a core, or of bytes. */}}
{{- define "session.milli" -}}
{{- $text := toString . -}}
{{- if hasSuffix "m" $text }}{{ trimSuffix "m" $text | float64 }}{{ else }}{{ mulf (float64 $text) 1000 }}{{ end }}
{{- end }}
{{- define "session.bytes" -}}
{{- $text := toString . -}}
{{- $unit := regexFind "[A-Za-z]+$" $text -}}
{{- $sizes := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- mulf (trimSuffix $unit $text | float64) (get $sizes $unit | float64) | int64 }}
{{- end }}

{{/*
The resources of each enabled service by name, and "" for the whole pod. Who has no limit of its own gets its share
of what the others leave of the totals; who has no request of its own requests a part of its limit.
*/}}
{{- define "session.resources" -}}
{{- $values := .Values }}
{{- $names := (include "session.services" . | fromYaml).names }}
{{- $result := dict "" (dict "limits" (dict) "requests" (dict)) }}
{{- range $name := $names }}
{{- $own := (get $values.services $name).resources | default dict }}
{{- $_ := set $result $name (dict "limits" ($own.limits | default dict | deepCopy) "requests" ($own.requests | default dict | deepCopy)) }}
{{- end }}
{{- range $resource := list "cpu" "memory" }}
{{- $number := ternary "session.milli" "session.bytes" (eq $resource "cpu") }}
{{- $unit := ternary 1.0 1048576.0 (eq $resource "cpu") }}
{{- $suffix := ternary "m" "Mi" (eq $resource "cpu") }}
{{- $percent := get $values.resources.requestPercent $resource }}
{{- $total := include $number (get $values.resources $resource) | float64 }}
{{- $free := $total }}
{{- $shares := 0.0 }}
{{- range $name := $names }}
{{- $own := get (get $result $name).limits $resource }}
{{- if $own }}{{ $free = subf $free (include $number $own | float64) }}
{{- else }}{{ $shares = addf $shares (get $values.services $name).share }}{{ end }}
{{- end }}
{{- $limits := 0.0 }}
{{- $requests := 0.0 }}
{{- range $name := $names }}
{{- $of := get $result $name }}
{{- if not (get $of.limits $resource) }}
{{- $limit := divf $free (mulf $shares $unit) (divf 1.0 (get $values.services $name).share) | floor }}
{{- if lt $limit 1.0 }}
{{- fail (printf "resources.%s: %v leaves nothing for the service %s: raise it, or lower the limits of the others" $resource (get $values.resources $resource) $name) }}
{{- end }}
{{- $_ := set $of.limits $resource (printf "%d%s" (int64 $limit) $suffix) }}
{{- end }}
{{- $limit := include $number (get $of.limits $resource) | float64 }}
{{- if not (get $of.requests $resource) }}
{{- $_ := set $of.requests $resource (printf "%d%s" (divf (mulf $limit $percent) (mulf 100.0 $unit) | ceil | int64) $suffix) }}
{{- end }}
{{- $request := include $number (get $of.requests $resource) | float64 }}
{{- if gt $request $limit }}
{{- fail (printf "services.%s.resources.requests.%s: %v is more than the limit, %v" $name $resource (get $of.requests $resource) (get $of.limits $resource)) }}
{{- end }}
{{- $limits = addf $limits $limit }}
{{- $requests = addf $requests $request }}
{{- end }}
{{- $all := get $result "" }}
{{- $_ := set $all.limits $resource (printf "%d%s" (divf (maxf $total $limits) $unit | ceil | int64) $suffix) }}
{{- $_ := set $all.requests $resource (printf "%d%s" (divf $requests $unit | ceil | int64) $suffix) }}
{{- end }}
{{- toYaml $result }}
{{- end }}

{{/* A quantity of the whole pod, times the pods that the quota is for: (list number quantity unit). */}}
{{- define "session.times" -}}
{{- $unit := regexFind "[A-Za-z]+$" (last .) -}}
{{- printf "%d%s" (mul (first .) (trimSuffix $unit (last .) | int64)) $unit }}
{{- end }}

{{/* The smaller of two quantities: (list "cpu" one other). */}}
{{- define "session.smaller" -}}
{{- $number := ternary "session.milli" "session.bytes" (eq (first .) "cpu") -}}
{{- $one := index . 1 -}}
{{- if le (include $number $one | float64) (include $number (last .) | float64) }}{{ $one }}{{ else }}{{ last . }}{{ end }}
{{- end }}

{{/* How a probe asks whether a service is ready. */}}
{{- define "session.ready" -}}
{{- if .ready -}}
httpGet:
  path: {{ .ready | quote }}
  port: {{ .port }}
{{- else -}}
tcpSocket:
  port: {{ .port }}
{{- end }}
{{- end }}

{{/* A value as text: whole numbers without an exponent. */}}
{{- define "session.text" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) }}{{ int64 . }}{{ else }}{{ . }}{{ end }}
{{- end }}
