DROP INDEX sessions_machine_config_idx;
ALTER TABLE machine_configs DROP COLUMN max_sessions, DROP COLUMN workspaces, DROP COLUMN users;
ALTER TABLE providers DROP COLUMN credentials, DROP COLUMN endpoint;
