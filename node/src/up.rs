//! `trine up`: the three nodes of a cloud on this machine, running until stopped.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::cluster::{Addresses, Cluster, NODES};

/// What `trine up` takes.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  trine up\n  trine up --directory /srv/trine\n  trine up --down --directory /srv/trine"
)]
pub(crate) struct Args {
    /// Where the three nodes keep their data (default: ~/.local/share/trine).
    #[arg(long)]
    directory: Option<PathBuf>,
    /// Stops the nodes and everything that runs on them, guests included; the data stays.
    #[arg(long)]
    down: bool,
    /// When `up` itself is stopped, leave guests, switches and storage running.
    #[arg(long)]
    leave_guests: bool,
    /// First three numbers of the loopback addresses: nodes get .1 to .3, floating addresses come
    /// from the next /24.
    #[arg(long, default_value_t = Addresses::DEFAULT)]
    addresses: Addresses,
}

/// Starts the cloud (making it the first time) and waits for Ctrl-C or SIGTERM.
pub(crate) fn run(args: Args) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(up(&args))
}

async fn up(args: &Args) -> Result<()> {
    let directory = match &args.directory {
        Some(directory) => directory.clone(),
        None => default_directory()?,
    };
    let mut cluster = Cluster::at(&directory, args.addresses)?;
    if args.down {
        return cluster.end().await;
    }
    let started = tokio::select! {
        started = start(&mut cluster, args.addresses) => started,
        signal = stop_signal() => signal.and(Err(anyhow::anyhow!("interrupted"))),
    };
    if let Err(error) = started {
        cluster.stop_nodes().await?;
        return Err(error);
    }
    print_use(&cluster);
    stop_signal().await?;
    if args.leave_guests {
        println!("stopping the nodes; guests go on");
        cluster.stop_nodes().await
    } else {
        println!("stopping the nodes and their guests; they start again with the next `trine up`");
        cluster.end().await
    }
}

async fn start(cluster: &mut Cluster, addresses: Addresses) -> Result<()> {
    if cluster.exists() {
        println!("starting the three nodes of {}", cluster.directory().display());
        return cluster.start().await;
    }
    println!("making a cloud of three nodes in {}", cluster.directory().display());
    cluster.make_first(addresses).await?;
    for index in 1..NODES {
        cluster.join(index).await?;
    }
    Ok(())
}

async fn stop_signal() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted?,
        _ = terminate.recv() => {}
    }
    Ok(())
}

fn default_directory() -> Result<PathBuf> {
    let home = std::env::var_os("XDG_DATA_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/share")));
    Ok(home.context("neither XDG_DATA_HOME nor HOME is set; say --directory")?.join("trine"))
}

fn print_use(cluster: &Cluster) {
    for member in cluster.members() {
        println!("  {}  https://{}", member.name, member.api_address());
    }
    let directory = cluster.members()[0].data_directory.display();
    println!(
        "trine up ready\n\
         \x20 export OS_CLIENT_CONFIG_FILE={directory}/clouds.yaml OS_CLOUD=trine\n\
         \x20 openstack server list\n\
         or  . {directory}/admin-openrc\n\
         Ctrl-C stops it."
    );
}
