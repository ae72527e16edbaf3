-- What a project says of the chart that its sessions are made from.
-- depends: 0006.cluster

-- As `orchestrator.machine_schema.ChartValuesSchema` takes it.
ALTER TABLE projects ADD COLUMN chart_values jsonb NOT NULL DEFAULT '{}';
