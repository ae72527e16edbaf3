-- What runs where: providers, sizes, sessions, and what happened to them.
-- depends: 0001.identity

CREATE TABLE providers (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE,
    kind text NOT NULL CHECK (kind IN ('local', 'docker', 'devpod', 'kubernetes')),
    options jsonb NOT NULL DEFAULT '{}',
    enabled boolean NOT NULL DEFAULT true,
    is_default boolean NOT NULL DEFAULT false,
    -- What an orchestrator found when it last reached for the provider.
    state text NOT NULL DEFAULT 'unknown' CHECK (state IN ('unknown', 'up', 'down')),
    message text NOT NULL DEFAULT '',
    checked_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX providers_default_key ON providers (is_default) WHERE is_default;

CREATE TABLE machine_configs (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE,
    provider_id bigint NOT NULL REFERENCES providers ON DELETE RESTRICT,
    is_default boolean NOT NULL DEFAULT false,
    cpu double precision,
    memory_bytes bigint,
    disk_bytes bigint,
    services jsonb NOT NULL DEFAULT '{}',
    options jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
-- The machine config of a provider that a session gets when it names none.
CREATE UNIQUE INDEX machine_configs_default_key ON machine_configs (provider_id) WHERE is_default;

CREATE TABLE sessions (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    project_id bigint NOT NULL REFERENCES projects ON DELETE RESTRICT,
    -- Copies of what the project says, so that the list needs no join; neither ever changes for a project.
    project_uuid uuid NOT NULL,
    workspace_id bigint NOT NULL REFERENCES workspaces ON DELETE RESTRICT,
    user_id bigint REFERENCES users ON DELETE SET NULL,
    -- A deleted session outlives its provider; no other does.
    provider_id bigint REFERENCES providers ON DELETE SET NULL
        CONSTRAINT sessions_provider_check CHECK (provider_id IS NOT NULL OR status = 'deleted'),
    provider text NOT NULL,
    machine_config text NOT NULL,
    -- What the session was made with: the machine config as it was then.
    machine jsonb NOT NULL,
    namespace text NOT NULL,
    container_name text NOT NULL,

    -- What is wanted. `generation` grows with each request, so that a restart of what runs is a difference too.
    desired text NOT NULL DEFAULT 'running' CHECK (desired IN ('running', 'stopped', 'deleted')),
    generation bigint NOT NULL DEFAULT 1,
    -- What is observed. The generation that the status speaks of; 0: none was carried out yet.
    observed_generation bigint NOT NULL DEFAULT 0,
    status text NOT NULL DEFAULT 'pending' CHECK (status IN (
        'pending', 'starting', 'running', 'stopping', 'stopped', 'deleting', 'deleted', 'error')),
    reason text NOT NULL DEFAULT '',
    message text NOT NULL DEFAULT '',
    -- The provider cannot be reached: the status is the last one known.
    stale boolean NOT NULL DEFAULT false,
    ip_address text,
    preview_url text,
    preview_path text,
    chat_url text,
    chat_path text,
    vscode_url text,
    vscode_path text,

    -- Who works on the difference, and until when nobody else may.
    lease_owner uuid,
    lease_expires_at timestamptz,
    -- Failed attempts since the last success, and when the next is due.
    attempts integer NOT NULL DEFAULT 0,
    next_attempt_at timestamptz NOT NULL DEFAULT now(),
    -- When a start that is under way is given up.
    start_deadline_at timestamptz,

    expires_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
-- One active session a project.
CREATE UNIQUE INDEX sessions_active_key ON sessions (project_id) WHERE status <> 'deleted';
-- The lists, newest first: `docs/performance.md` says which index serves which. All hold the status, so that one serves
-- lists with and without it: without, one probe for each status but `deleted`. In the order of `created_at`, not of `id`
-- alone, or else the planner prefers to read the primary key backwards and to throw away what does not fit.
CREATE INDEX sessions_status_idx ON sessions (status, created_at DESC, id DESC);
CREATE INDEX sessions_workspace_idx ON sessions (workspace_id, status, created_at DESC, id DESC);
CREATE INDEX sessions_user_idx ON sessions (user_id, status, created_at DESC, id DESC);
CREATE INDEX sessions_workspace_user_idx ON sessions (workspace_id, user_id, status, created_at DESC, id DESC);
CREATE INDEX sessions_project_idx ON sessions (project_id, status, created_at DESC, id DESC);
-- What should run is inspected regularly, in the order of the ids.
CREATE INDEX sessions_inspected_idx ON sessions (id)
    WHERE status IN ('starting', 'running') AND desired = 'running' AND observed_generation = generation AND NOT stale;
-- The work list of the reconcile loop: desired and observed differ.
CREATE INDEX sessions_due_idx ON sessions (next_attempt_at)
    WHERE observed_generation < generation OR stale;
CREATE INDEX sessions_expiry_idx ON sessions (expires_at) WHERE status <> 'deleted' AND desired <> 'deleted';
CREATE INDEX sessions_purge_idx ON sessions (updated_at) WHERE status = 'deleted';
-- For the reference: a provider's sessions are looked for when it is removed.
CREATE INDEX sessions_provider_idx ON sessions (provider_id);

CREATE TABLE session_events (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    session_id bigint NOT NULL REFERENCES sessions ON DELETE CASCADE,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    status text NOT NULL,
    reason text NOT NULL,
    message text NOT NULL
);
CREATE INDEX session_events_session_idx ON session_events (session_id, id DESC);

-- The last output lines of each session, written in batches and pruned.
CREATE TABLE session_logs (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    session_id bigint NOT NULL REFERENCES sessions ON DELETE CASCADE,
    at timestamptz NOT NULL,
    service text NOT NULL,
    stream text NOT NULL,
    line text NOT NULL
);
CREATE INDEX session_logs_session_idx ON session_logs (session_id, id DESC);

-- The answers that requests with an Idempotency-Key got.
CREATE TABLE idempotency_keys (
    user_id bigint NOT NULL REFERENCES users ON DELETE CASCADE,
    key text NOT NULL,
    request_hash bytea NOT NULL,
    status integer NOT NULL,
    body bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, key)
);
CREATE INDEX idempotency_keys_created_idx ON idempotency_keys (created_at);
