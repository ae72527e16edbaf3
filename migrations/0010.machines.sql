-- Where a provider is reached and by which credentials; who may use a machine config, and how many sessions it takes.
-- depends: 0009.apps

ALTER TABLE providers
    -- As its kind takes it (`orchestrator.machine_schema`). NULL: what the machine of the orchestrator leads to.
    ADD COLUMN endpoint text,
    -- References, never values: {"token": {"env": "NAME"}} or {"token": {"file": "/path"}}.
    ADD COLUMN credentials jsonb NOT NULL DEFAULT '{}';

ALTER TABLE machine_configs
    -- Ids. Both empty: everybody. No references: who is deleted must not open to all what was for few.
    ADD COLUMN users bigint[] NOT NULL DEFAULT '{}',
    ADD COLUMN workspaces bigint[] NOT NULL DEFAULT '{}',
    -- Of those that are to run. NULL: no limit.
    ADD COLUMN max_sessions integer CHECK (max_sessions > 0);

-- Who uses a machine config, and how many run with it.
CREATE INDEX sessions_machine_config_idx ON sessions (machine_config) WHERE status <> 'deleted';
