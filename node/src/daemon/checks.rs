//! What must be right before a node starts anything: each failure says what to do.

use crate::config::NodeConfig;
use crate::data_directory::DataDirectory;
use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Takes the data directory for this process alone; the lock goes with the file.
pub(crate) fn lock(directory: &DataDirectory) -> Result<File> {
    let path = directory.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let root = directory.root().display();
            bail!(
                "the data directory {root} is in use by another node process; \
                 `trine status --data-dir {root}` shows it, `trine stop --data-dir {root}` ends it"
            )
        }
        Err(error) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}

/// `/dev/kvm` opens and is KVM.
pub(super) fn kvm() -> Result<()> {
    let path = Path::new("/dev/kvm");
    let file = match File::options().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => bail!(
            "/dev/kvm is not there: this machine needs hardware virtualisation (enable VT-x or \
             AMD-V in its firmware, or nested virtualisation at its host) and the kvm module"
        ),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            bail!("/dev/kvm may not be opened by this user: {}", who_may_open(path))
        }
        Err(error) => return Err(error).context("cannot open /dev/kvm"),
    };
    if !rustix::fs::FileType::from_raw_mode(file.metadata()?.mode()).is_char_device() {
        bail!("/dev/kvm is no device: something replaced it; `modprobe kvm` makes the real one");
    }
    Ok(())
}

fn who_may_open(path: &Path) -> String {
    let Ok(metadata) = std::fs::metadata(path) else { return "and its mode can't be read".into() };
    let group = group_name(metadata.gid()).unwrap_or_else(|| metadata.gid().to_string());
    if metadata.mode() & 0o060 == 0o060 {
        format!("add it to the group {group} (usermod -aG {group} $USER, then sign in again)")
    } else {
        format!(
            "its mode is {:o}, owner uid {}; as root: chgrp kvm /dev/kvm && chmod 660 /dev/kvm, \
             and add the user to the group kvm",
            metadata.mode() & 0o777,
            metadata.uid()
        )
    }
}

fn group_name(gid: u32) -> Option<String> {
    let mut text = String::new();
    File::open("/etc/group").ok()?.read_to_string(&mut text).ok()?;
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
    })
}

/// Binds the API's listener, to be kept.
pub(super) fn bind_api(config: &NodeConfig) -> Result<TcpListener> {
    let listener = TcpListener::bind(config.api())
        .map_err(|error| taken(error, "the API", "TCP", config.api(), "api_port"))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// The ports that the raft transport will bind in a moment.
pub(super) fn raft_port(config: &NodeConfig) -> Result<()> {
    probe_tcp("consensus", config.raft(), "raft_port")
}

/// The port that a storage process to be started will bind.
pub(super) fn storage_port(config: &NodeConfig) -> Result<()> {
    probe_tcp("storage", config.storage(), "storage_port")
}

/// The port that a switch to be started will bind.
pub(super) fn vxlan_port(config: &NodeConfig) -> Result<()> {
    let address = config.vtep();
    UdpSocket::bind(address)
        .map(drop)
        .map_err(|error| taken(error, "VXLAN", "UDP", address, "vxlan_port"))
}

fn probe_tcp(what: &str, address: SocketAddr, key: &str) -> Result<()> {
    TcpListener::bind(address).map(drop).map_err(|error| taken(error, what, "TCP", address, key))
}

fn taken(
    error: std::io::Error,
    what: &str,
    protocol: &str,
    address: SocketAddr,
    key: &str,
) -> anyhow::Error {
    let (ip, port) = (address.ip(), address.port());
    let advice = match error.kind() {
        ErrorKind::AddrInUse => format!(
            "{protocol} port {port} of {ip} is taken by another program (`ss -lnp` shows which); \
             end it or set another {key} in node.toml"
        ),
        ErrorKind::AddrNotAvailable => {
            format!("{ip} is no address of this host; set `address` in node.toml")
        }
        ErrorKind::PermissionDenied => {
            format!("{protocol} port {port} needs privilege; set another {key} in node.toml")
        }
        _ => error.to_string(),
    };
    anyhow::anyhow!("cannot serve {what} at {address}: {advice}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_is_named_with_address_port_and_key() {
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = other.local_addr().unwrap();
        let config = NodeConfig {
            address: address.ip(),
            api_port: address.port(),
            raft_port: address.port(),
            ..crate::config::example()
        };
        let api = bind_api(&config).unwrap_err().to_string();
        let raft = raft_port(&config).unwrap_err().to_string();
        for (message, key) in [(api, "api_port"), (raft, "raft_port")] {
            assert!(message.contains(&address.to_string()), "{message}");
            assert!(message.contains("is taken") && message.contains(key), "{message}");
        }
    }

    #[test]
    fn a_foreign_address_is_named() {
        let config = NodeConfig { address: [192, 0, 2, 1].into(), ..crate::config::example() };
        let message = vxlan_port(&config).unwrap_err().to_string();
        assert!(message.contains("192.0.2.1 is no address of this host"), "{message}");
    }
}
