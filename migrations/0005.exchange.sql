-- What comes from other services over RabbitMQ: whom they have told us of, and what of theirs was no event.
-- depends: 0004.revocation

-- The last that was obeyed about each of their users. It outlives the account, so that nothing late brings that back.
CREATE TABLE synced_users (
    external_id text PRIMARY KEY,
    -- NULL: what was told had no version, and only its order says what is newer.
    version bigint,
    -- NULL: the user lives.
    deleted_at timestamptz
);

-- Entries of the event log that are no events. Every gateway meets them; the key makes each one row.
CREATE TABLE dead_letters (
    epoch text NOT NULL,
    log_offset bigint NOT NULL,
    event_id text NOT NULL,
    routing_key text NOT NULL,
    reason text NOT NULL,
    -- Whole until it is published, then its beginning.
    body bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    -- When RabbitMQ confirmed it in the queue of dead letters.
    published_at timestamptz,
    PRIMARY KEY (epoch, log_offset)
);
CREATE INDEX dead_letters_waiting_idx ON dead_letters (created_at) WHERE published_at IS NULL;
CREATE INDEX dead_letters_created_idx ON dead_letters (created_at);
