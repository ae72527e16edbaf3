-- Apps that are deployed from Git: what they are, their deployments as a queue and a history, and the deployments' logs.
-- depends: 0008.pods

CREATE TABLE apps (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    workspace_id bigint NOT NULL REFERENCES workspaces ON DELETE RESTRICT,
    created_by bigint REFERENCES users ON DELETE SET NULL,
    -- A DNS label: the host, the router and the containers are named after it.
    name text NOT NULL UNIQUE CHECK (name ~ '^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$'),
    repo_url text NOT NULL,
    -- NULL: the repository's own default branch.
    branch text,
    -- What a deployment takes a copy of (`deployments.contract.AppSettings`).
    settings jsonb NOT NULL,
    -- Encrypted: `deployments.contract.AppSecrets` (environment, deploy key, deploy token).
    secrets bytea,
    -- Encrypted: what webhooks are signed with.
    hook_secret bytea,
    auto_deploy boolean NOT NULL DEFAULT true,
    -- The number of the newest deployment.
    last_number integer NOT NULL DEFAULT 0,
    -- Asked to go: a worker removes all that runs, then the row.
    deleting boolean NOT NULL DEFAULT false,
    -- What keeps the removal waiting.
    message text NOT NULL DEFAULT '',
    lease_owner uuid,
    lease_expires_at timestamptz,
    next_attempt_at timestamptz NOT NULL DEFAULT now(),
    attempts integer NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX apps_workspace_idx ON apps (workspace_id, id DESC);
CREATE INDEX apps_deleting_idx ON apps (next_attempt_at) WHERE deleting;
CREATE INDEX apps_domains_idx ON apps USING gin ((settings -> 'domains'));

CREATE TABLE deployments (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    app_id bigint NOT NULL REFERENCES apps ON DELETE CASCADE,
    workspace_id bigint NOT NULL REFERENCES workspaces ON DELETE RESTRICT,
    -- 1, 2, 3 … of its app.
    number integer NOT NULL,
    -- What made it: 'create', 'manual', 'push', 'rollback'; and who, where a user did.
    cause text NOT NULL CHECK (cause IN ('create', 'manual', 'push', 'rollback')),
    user_id bigint REFERENCES users ON DELETE SET NULL,
    -- The deployment whose image and settings a rollback takes.
    rollback_of bigint REFERENCES deployments ON DELETE SET NULL,
    -- What it is made with: copies, which later changes of the app do not touch.
    repo_url text NOT NULL,
    branch text,
    settings jsonb NOT NULL,
    secrets bytea,
    -- The commit to be built; NULL: the newest of the branch. Then the one that was.
    commit_id text,
    commit_message text NOT NULL DEFAULT '',

    status text NOT NULL DEFAULT 'queued' CHECK (status IN (
        'queued', 'deploying', 'live', 'retired', 'failed', 'cancelled', 'superseded')),
    -- The step that is under way, or that it ended in; '' before the first.
    step text NOT NULL DEFAULT '',
    -- What was done so far: [{"name", "status": "running|done|failed|cancelled", "seconds"}].
    steps jsonb NOT NULL DEFAULT '[]',
    reason text NOT NULL DEFAULT '',
    message text NOT NULL DEFAULT '',
    cancel_requested boolean NOT NULL DEFAULT false,
    -- The image's name and id; the container that runs it.
    image text,
    image_id text,
    container text,
    url text,

    -- Who works on it, and until when nobody else may.
    lease_owner uuid,
    lease_expires_at timestamptz,
    next_attempt_at timestamptz NOT NULL DEFAULT now(),
    -- How often a worker took it.
    attempts integer NOT NULL DEFAULT 0,

    created_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    finished_at timestamptz,
    updated_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (app_id, number)
);
CREATE INDEX deployments_app_idx ON deployments (app_id, id DESC);
-- What is not at its end. A live one may be: those before it are drained and removed still.
CREATE INDEX deployments_due_idx ON deployments (next_attempt_at) WHERE finished_at IS NULL;
-- One at a time for an app, and one that serves.
CREATE UNIQUE INDEX deployments_deploying_key ON deployments (app_id) WHERE status = 'deploying';
CREATE UNIQUE INDEX deployments_live_key ON deployments (app_id) WHERE status = 'live';
-- Whose domains are routed, or will be.
CREATE INDEX deployments_domains_idx ON deployments USING gin ((settings -> 'domains'))
    WHERE status IN ('queued', 'deploying', 'live');
CREATE INDEX deployments_rollback_idx ON deployments (rollback_of) WHERE rollback_of IS NOT NULL;
-- For who is deleted, and what: it is looked up here.
CREATE INDEX deployments_workspace_idx ON deployments (workspace_id);
CREATE INDEX deployments_user_idx ON deployments (user_id) WHERE user_id IS NOT NULL;

-- The log of a deployment, in pieces that follow one another without gaps.
CREATE TABLE deployment_logs (
    deployment_id bigint NOT NULL REFERENCES deployments ON DELETE CASCADE,
    -- Bytes (of UTF-8) of the log before this piece, and of the piece.
    position bigint NOT NULL,
    length integer NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    step text NOT NULL,
    text text NOT NULL,
    PRIMARY KEY (deployment_id, position)
);

-- Deliveries of webhooks that were obeyed: a repeated one is not obeyed again.
CREATE TABLE hook_deliveries (
    app_id bigint NOT NULL REFERENCES apps ON DELETE CASCADE,
    delivery text NOT NULL,
    at timestamptz NOT NULL DEFAULT now(),
    deployment_id bigint REFERENCES deployments ON DELETE SET NULL,
    PRIMARY KEY (app_id, delivery)
);
CREATE INDEX hook_deliveries_at_idx ON hook_deliveries (at);
CREATE INDEX hook_deliveries_deployment_idx ON hook_deliveries (deployment_id);

-- A hint for the workers: something is queued, to be cancelled or to be removed.
CREATE FUNCTION notify_deployments() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NOTIFY deployments;
    RETURN NULL;
END $$;
CREATE TRIGGER deployments_notify_insert AFTER INSERT ON deployments
    FOR EACH STATEMENT EXECUTE FUNCTION notify_deployments();
CREATE TRIGGER deployments_notify_cancel AFTER UPDATE OF cancel_requested ON deployments
    FOR EACH STATEMENT EXECUTE FUNCTION notify_deployments();
CREATE TRIGGER apps_notify_delete AFTER UPDATE OF deleting ON apps
    FOR EACH STATEMENT EXECUTE FUNCTION notify_deployments();
