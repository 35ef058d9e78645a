{{- define "aqt.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "aqt.metadata" -}}
name: {{ .Release.Name }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "aqt.selector" . | nindent 2 }}
  app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- /* A file for --config: of what settings are made of, JSON is TOML. */}}
{{- define "aqt.configuration" -}}
{{- $drain := dict "batching" (dict "drain_s" .Values.drainSeconds) -}}
{{- range $group, $settings := mergeOverwrite (deepCopy .Values.settings) $drain -}}
[{{ $group }}]
{{ range $name, $value := $settings -}}
{{ $name }} = {{ toJson $value }}
{{ end -}}
{{- end -}}
{{- end }}
