//! `trine vmm`: one guest without a cloud. It becomes the embedded VMM.

use anyhow::{Context, Result};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// What `trine vmm` takes.
#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  trine image export guest.img\n  cat > vm.json <<'END'\n  {\"version\": 1, \"id\": \"try\", \"memory_mib\": 128, \"boot\": {\"kernel\": {\"path\": \"guest.img\"}},\n   \"control\": {\"path\": \"/tmp/try.sock\"}}\n  END\n  trine vmm --config vm.json --boot-timer\n\nWhile it runs:\n  trine vmm control /tmp/try.sock status\n  trine vmm control /tmp/try.sock metrics\n  trine vmm control /tmp/try.sock add-disk '{\"id\": \"data\", \"source\": {\"raw\": {\"path\": \"data.img\"}}}'"
)]
pub(crate) struct Args {
    #[command(subcommand)]
    control: Option<Control>,
    /// The guest's configuration, JSON.
    #[arg(long, required = true)]
    config: Option<PathBuf>,
    /// When the guest has ended, say how long its start took.
    #[arg(long)]
    boot_timer: bool,
}

#[derive(clap::Subcommand)]
enum Control {
    /// Ask something of a running guest by its control socket.
    #[command(after_help = vmm::control::command::USAGE.replace("trine-vmm", "trine vmm"))]
    Control {
        /// The socket that its configuration names.
        socket: PathBuf,
        /// What is asked: status, metrics, pause, resume, kill, add-disk, remove-disk, …
        #[arg(required = true)]
        command: Vec<String>,
    },
}

/// Replaces this process by the VMM; returns only where that fails. Control requests are made here.
pub(crate) fn run(args: Args) -> Result<()> {
    if let Some(Control::Control { socket, command }) = args.control {
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        print!("{}", vmm::control::command::run(&socket, &command)?);
        return Ok(());
    }
    let directory = cache_directory().join("bin");
    let executables = crate::embedded::install(&directory)
        .with_context(|| format!("cannot put the VMM into {}", directory.display()))?;
    let mut vmm = Command::new(&executables.vmm);
    vmm.arg("run").args(args.boot_timer.then_some("--boot-timer"));
    let error = vmm.arg("--config").args(&args.config).exec();
    Err(error).with_context(|| format!("cannot run {}", executables.vmm.display()))
}

fn cache_directory() -> PathBuf {
    let of_user = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    of_user.unwrap_or_else(|| PathBuf::from("/var/cache")).join("trine")
}
