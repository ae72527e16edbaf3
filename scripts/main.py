"""`cluster-code`: the commands of operators and developers.

What is expected to go wrong is told in one line on stderr: exit 2 when a setting or the usage is wrong, 1 when the work
failed. Everything heavy is imported by the command that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from environs import Env

T = TypeVar("T")

_FILE = click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
_DRY_RUN = click.option("--dry-run", is_flag=True, help="Say what would change, and change nothing.")


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; returns the exit code. Expected errors are told on stderr."""
    try:
        code = cli.main(arguments, prog_name="cluster-code", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("cluster-code: interrupted", err=True)
        return 130
    except Exception as error:
        code = _expected(error)
        if code is None:
            raise
        click.echo(f"cluster-code: {error}", err=True)
    return code if isinstance(code, int) else 0


def _expected(error: Exception) -> int | None:
    """The exit code of an error that we raise on purpose; None: a bug, which deserves its traceback."""
    from auth.errors import AuthError
    from orchestrator.errors import ClusterCodeError, SchemaOutdated, SettingsError

    if isinstance(error, SettingsError | SchemaOutdated):
        return 2
    return 1 if isinstance(error, ClusterCodeError | AuthError) else None


def _nothing_to_lose() -> None:
    """Let Ctrl-C end the process at once until it takes signals itself.

    Python raises an interrupt wherever it is, and inside an import that may be in a callback which only reports it: the
    server would start as if nobody had asked it to end.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cluster-code")
def cli() -> None:
    """Cluster Code: development sessions for every project, and every event of theirs in the browser.

    Settings come from the environment and from .env; `cluster-code settings` lists them.
    """


@cli.command()
def dev() -> None:
    """Run everything in one process, on the embedded PostgreSQL."""
    _nothing_to_lose()
    from scripts import dev

    dev.main(_env())


@cli.command()
@click.option(
    "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that share the port."
)
def serve(workers: int) -> None:
    """Run one gateway."""
    _nothing_to_lose()
    from gateway.__main__ import main as run_gateway

    sys.exit(run_gateway(["--workers", str(workers)]))


@cli.command()
def worker() -> None:
    """Run one orchestrator."""
    _nothing_to_lose()
    from orchestrator.__main__ import main as run_orchestrator

    sys.exit(run_orchestrator())


@cli.command()
@click.option("--url", help="The server; by default the `cluster-code dev` that runs on DATA_DIR.")
@click.option("--repo", envvar="REPO", help="URL of a Git repository; by default a small one is made and served.")
@click.option("--branch", envvar="BRANCH", help="Its branch; by default the repository's own.")
@click.option("--email", help="An account to sign in with; by default a throw-away one is registered.")
@click.option("--password", envvar="DEMO_PASSWORD", hidden=True)
@click.option("--provider", help="Where the session runs; by default the server's own default.")
@click.option("--machine-config", help="Its size; by default the provider's own default.")
@click.option(
    "--deadline", type=click.FloatRange(min=1), help="Seconds for all of it; by default 120, 300 with --provider."
)
def demo(
    url: str | None,
    repo: str | None,
    branch: str | None,
    email: str | None,
    password: str | None,
    provider: str | None,
    machine_config: str | None,
    deadline: float | None,
) -> None:
    """See a session come and go: sign in, watch the socket, start, fetch the preview, delete.

    With --provider kubernetes, on the cluster of the server's KUBECONFIG: pod by pod, until its namespace is gone.

    The password of --email is read from DEMO_PASSWORD or asked for.
    """
    from scripts.demo import Options
    from scripts.demo import main as run_demo
    from scripts.demo_client import Account

    if email and password is None:
        password = click.prompt("Password", hide_input=True)
    sys.exit(run_demo(_env(), Options(Account(email, password), url, repo, branch, provider, machine_config, deadline)))


@cli.command("demo-deploy")
@click.option("--url", help="The server; by default the `cluster-code dev` that runs on DATA_DIR.")
@click.option("--front", help="A Traefik that follows the server's Docker engine; by default one is started for this.")
@click.option("--image", envvar="DOCKER_DEMO_IMAGE", help="What the app stands on: an image with busybox.")
@click.option("--email", help="An account to sign in with; by default a throw-away one is registered.")
@click.option("--password", envvar="DEMO_PASSWORD", hidden=True)
@click.option("--deadline", type=click.FloatRange(min=1), help="Seconds for all of it; by default 300.")
def demo_deploy(
    url: str | None,
    front: str | None,
    image: str | None,
    email: str | None,
    password: str | None,
    deadline: float | None,
) -> None:
    """See an app deployed from Git: built, run behind Traefik, a broken commit survived, rolled back, removed.

    The password of --email is read from DEMO_PASSWORD or asked for.
    """
    from scripts.demo_client import Account
    from scripts.demo_deploy import Options
    from scripts.demo_deploy import main as run_demo

    if email and password is None:
        password = click.prompt("Password", hide_input=True)
    sys.exit(run_demo(_env(), Options(Account(email, password), url, front, image, deadline)))


@cli.command()
@click.argument("channels", metavar="[CHANNEL]...", nargs=-1)
@click.option("--json", "json_", is_flag=True, help="One event per line, as JSON, for programs.")
@click.option("--since", metavar="POSITION", help="Begin with what came after that position; by default now.")
@click.option("--url", envvar="CLUSTER_CODE_URL", help="The server; by default the `cluster-code dev` on DATA_DIR.")
@click.option(
    "--token-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file with a main or API token; read anew for each connection.",
)
@click.option("--email", help="See what this user sees, on the server of DATA_DIR; by default the administrator.")
def watch(
    channels: tuple[str, ...],
    json_: bool,
    since: str | None,
    url: str | None,
    token_file: Path | None,
    email: str | None,
) -> None:
    """Watch events as they happen: of the user's own channel, and of each CHANNEL, such as session:42 or broadcast.

    Goes on through every cut, each event once and in order, until Ctrl-C; what has to be said beside them goes to
    stderr, `recovered: false` too. The token is read from CLUSTER_CODE_TOKEN or from --token-file; for the server of
    DATA_DIR none is needed. Exits with 1 when the server refuses for good.
    """
    from orchestrator import log_setup
    from scripts.watch import Options
    from scripts.watch import main as run_watch

    env = _env()
    log_setup.configure(env, at_least="warning")
    sys.exit(run_watch(env, Options(channels, json_, since, url, token_file, email)))


@cli.command("settings")
@click.option("--env", "form", flag_value="env", help="As .env.example.")
@click.option("--markdown", "form", flag_value="markdown", help="As the README's table.")
def settings_(form: str | None) -> None:
    """List every variable that can be set."""
    from scripts import reference

    if form == "env":
        click.echo(reference.env_file(), nl=False)
    elif form == "markdown":
        click.echo(reference.markdown(), nl=False)
    else:
        _print_table(reference.table())


@cli.command("migrate:up")
def migrate_up() -> None:
    """Bring the database's schema up to date. Safe to run from several machines at once."""
    from scripts import schema

    for migration in (done := _run(schema.up)):
        click.echo(f"applied {migration}")
    click.echo("The schema is up to date." if done else "The schema was up to date already.")


@cli.command("migrate:down")
@click.option("--count", type=click.IntRange(min=1), default=1, show_default=True, help="How many migrations.")
def migrate_down(count: int) -> None:
    """Take the last migrations back, with the data that their tables hold."""
    from scripts import schema

    for migration in (done := _run(schema.down, count)):
        click.echo(f"took back {migration}")
    if not done:
        click.echo("There was no migration to take back.")


@cli.command("migrate:status")
def migrate_status() -> None:
    """List the migrations, and whether the database has them."""
    from scripts import schema

    for one in _run(schema.status):
        click.echo(f"{'applied' if one.applied else 'missing':8} {one.migration}")


@cli.command("import-machine-configs")
@_FILE
@_DRY_RUN
def import_machine_configs(file: Path, dry_run: bool) -> None:
    """Make the providers and machine configs what the YAML FILE says: all of it, or nothing."""
    from scripts import machines

    _print_changes(_run(machines.import_file, file, dry_run=dry_run), dry_run=dry_run)


@cli.command("sync-users")
@_FILE
@_DRY_RUN
def sync_users(file: Path, dry_run: bool) -> None:
    """Make the accounts what FILE says: a JSON or YAML list of {id, email, name[, deleted]}. All of it, or nothing."""
    from scripts import sync

    _print_changes(_run(sync.sync, file, dry_run=dry_run), dry_run=dry_run)


@cli.group()
def provider() -> None:
    """The places where sessions run."""


@provider.command("add")
@click.argument("name")
@click.option("--kind", type=click.Choice(["local", "docker", "devpod", "kubernetes"]), required=True)
@click.option("--endpoint", help="Where it is; by default what the orchestrator's own machine leads to.")
@click.option(
    "--option", "pairs", metavar="KEY=VALUE", multiple=True, help="An option of the provider; may be repeated."
)
@click.option(
    "--credential",
    "references",
    metavar="NAME=env:VARIABLE|file:PATH",
    multiple=True,
    help="Where orchestrators find a credential; may be repeated. Values are never kept.",
)
@click.option("--default", is_flag=True, help="Sessions that name no provider get this one.")
@click.option("--disabled", is_flag=True, help="It takes no sessions yet.")
def provider_add(
    name: str,
    kind: str,
    endpoint: str | None,
    pairs: tuple[str, ...],
    references: tuple[str, ...],
    default: bool,
    disabled: bool,
) -> None:
    """Add a provider. Orchestrators open it within a second."""
    from scripts import machines

    try:
        options = machines.options(pairs)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--option") from error
    try:
        credentials = machines.references(references)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--credential") from error
    given = {
        "name": name,
        "kind": kind,
        "endpoint": endpoint,
        "options": options,
        "credentials": credentials,
        "enabled": not disabled,
        "default": default,
    }
    _run(machines.add, given)
    click.echo(f"provider {name}: added")


@provider.command("list")
def provider_list() -> None:
    """List the providers, and what was found when they were last reached for."""
    from rich.table import Table

    from scripts import machines

    table = Table("Name", "Kind", "Endpoint", "Default", "Enabled", "State", "Message", highlight=False)
    for row in _run(machines.providers):
        where = _harmless(row.endpoint or "")
        told = _harmless(row.message)
        table.add_row(row.name, row.kind, where, _yes(row.is_default), _yes(row.enabled), row.state, told)
    _print_table(table)


@provider.command("remove")
@click.argument("name")
def provider_remove(name: str) -> None:
    """Remove a provider that nothing uses."""
    from scripts import machines

    _run(machines.remove, name)
    click.echo(f"provider {name}: removed")


@provider.command("test")
@click.argument("name")
def provider_test(name: str) -> None:
    """Reach for a provider now, from here, and say what answers; exits with 1, and says why, when it cannot be used.

    Its credentials are read from this command's own environment and disk: run it as the orchestrator runs.
    """
    from scripts import machines

    click.echo(f"provider {name}: {_run(machines.test, name)}")


@cli.group("machine-config")
def machine_config() -> None:
    """The sizes of sessions."""


@machine_config.command("list")
def machine_config_list() -> None:
    """List the machine configs, and for whom they are."""
    from rich.table import Table

    from scripts import machines

    table = Table("Name", "Provider", "Default", "Cores", "MiB", "Users", "Workspaces", "Sessions", highlight=False)
    for row in _run(machines.machine_configs):
        cores = "" if row.cpu is None else f"{row.cpu:g}"
        size = "" if row.memory_bytes is None else str(row.memory_bytes >> 20)
        few = (" ".join(map(str, ids)) for ids in (row.users, row.workspaces))
        table.add_row(row.name, row.provider, _yes(row.is_default), cores, size, *few, str(row.max_sessions or ""))
    _print_table(table)


@machine_config.command("remove")
@click.argument("name")
def machine_config_remove(name: str) -> None:
    """Remove a machine config that no session has."""
    from scripts import machines

    _run(machines.remove_machine_config, name)
    click.echo(f"machine config {name}: removed")


@cli.group()
def user() -> None:
    """The accounts."""


@user.command("create")
@click.argument("email")
@click.option("--name", help="Shown to others; by default what comes before the @.")
@click.option("--admin", is_flag=True, help="Make an administrator.")
@click.option("--generate", is_flag=True, help="Make a password and print it, instead of asking for one.")
def user_create(email: str, name: str | None, admin: bool, generate: bool) -> None:
    """Make an account. Its password is asked for, read from standard input, or made and printed once (--generate)."""
    from scripts import users

    password = users.generate_password() if generate else _read_password()
    made = _run(users.create, email, name or email.partition("@")[0], password, admin=admin)
    click.echo(f"user {made.id} ({made.email}): added")
    if generate:
        click.echo(f"password: {password}")


@cli.group()
def token() -> None:
    """Main tokens."""


@token.command("issue")
@click.argument("email")
@click.option(
    "--scope", "scopes", type=click.Choice(["read", "write", "admin"]), multiple=True, help="May be repeated."
)
@click.option("--channel", "channels", metavar="PATTERN", multiple=True, help="A foreign channel, such as app:*.")
@click.option("--expires", metavar="TIME", help="Such as 90s, 30m, 1h or 7d; by default ACCESS_TOKEN_TTL.")
def token_issue(email: str, scopes: tuple[str, ...], channels: tuple[str, ...], expires: str | None) -> None:
    """Print a main token of the user EMAIL, and nothing else. Without --scope it may do all that the user may."""
    from scripts import users

    try:
        expires_in = users.seconds(expires) if expires is not None else None
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--expires") from error
    click.echo(_run(users.issue_token, email, scopes, channels, expires_in))


@cli.group()
def secrets() -> None:
    """What apps keep secret."""


@secrets.command("rotate")
def secrets_rotate() -> None:
    """Encrypt all of it with the first key of SECRETS_KEY, so that the keys behind that one can be dropped."""
    from scripts import keys

    rotated = _run(keys.rotate)
    click.echo(f"{rotated.renewed} encrypted anew.")
    if rotated.unreadable:
        apps = ", ".join(rotated.unreadable)
        raise click.ClickException(f"No key of SECRETS_KEY opens all of what these apps have: {apps}")


@cli.group()
def exchange() -> None:
    """The RabbitMQ exchange that other services publish to."""


@exchange.command("declare")
def exchange_declare() -> None:
    """Declare the exchange, the event log and the queues in RabbitMQ, and say what was there already."""
    from orchestrator.eventlog.rabbitmq import declare
    from orchestrator.settings import AmqpSettings, load

    for one in _run(lambda env: declare(load(AmqpSettings, env))):
        click.echo(f"{one.kind} {one.name}: {'was there' if one.existed else 'declared'}")


@cli.command("dead-letters")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="How many, newest first.")
def dead_letters(limit: int) -> None:
    """List the messages in the event log that were no events, each with the reason."""
    from rich.table import Table

    from scripts import letters

    table = Table("At", "Position", "Routing key", "Reason", "Body", "Put away", highlight=False)
    for one in _run(letters.newest, limit):
        body = one.body.decode(errors="replace")
        shown = body if len(body) <= 60 else f"{body[:60]}…"
        at = f"{one.created_at:%Y-%m-%d %H:%M:%S}"
        strange = (_harmless(text) for text in (one.routing_key, one.reason, repr(shown)))
        table.add_row(at, one.position, *strange, _yes(one.published_at is not None))
    _print_table(table)


def _harmless(text: str) -> Any:
    """A stranger's text, which neither the table nor the terminal takes for its own."""
    from rich.text import Text

    return Text("".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text))


def _env() -> Env:
    from orchestrator.settings import environment

    return environment()


def _run(command: Any, *arguments: Any, **options: Any) -> Any:
    """Run an admin command's coroutine function, quiet but for warnings."""
    from orchestrator import log_setup

    env = _env()
    log_setup.configure(env, at_least="warning")
    work: Coroutine[Any, Any, Any] = command(env, *arguments, **options)
    return asyncio.run(work)


def _read_password() -> str:
    if sys.stdin.isatty():
        return str(click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
    password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise click.UsageError("standard input gave no password: pipe one line in, or use --generate")
    return password


def _print_changes(changes: list[Any], *, dry_run: bool) -> None:
    for change in changes:
        click.echo(str(change))
    if not any(change.action != "unchanged" for change in changes):
        click.echo("Nothing to change.")
    elif dry_run:
        click.echo("This was a dry run: nothing was changed.")


def _print_table(table: Any) -> None:
    from rich.console import Console

    # Not cut to 80 columns when it goes into a file or a pipe.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _yes(value: bool) -> str:
    return "yes" if value else ""


if __name__ == "__main__":
    main()
