ALTER TABLE projects DROP COLUMN chart_values;
