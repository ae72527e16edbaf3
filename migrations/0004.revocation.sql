-- Revocation: single tokens that are void before their time, and which main token came with which refresh token.
-- depends: 0003.outbox

CREATE TABLE revoked_tokens (
    user_id bigint NOT NULL REFERENCES users ON DELETE CASCADE,
    -- The `jti` of a main token, of ours or of the outside issuer.
    token_id text NOT NULL,
    -- Until then somebody might believe it; infinity: its end is not known here.
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (user_id, token_id)
);
CREATE INDEX revoked_tokens_expiry_idx ON revoked_tokens (expires_at);

-- The main token that was issued together with a refresh token: whoever revokes the one, revokes the other.
ALTER TABLE refresh_tokens ADD COLUMN main_token_id text, ADD COLUMN main_expires_at timestamptz;
CREATE INDEX refresh_tokens_main_token_idx ON refresh_tokens (user_id, main_token_id);

-- A short token that opened a stream of server-sent events may open it again from the same address, since the browser
-- comes back by itself. NULL: it opened a WebSocket, or may not come back any more.
ALTER TABLE spent_short_tokens ADD COLUMN address text;
