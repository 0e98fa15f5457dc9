//! Volumes of other hosts that servers here use: NBD inside TLS on one side, a Unix socket for the
//! guest's process on the other, bytes carried both ways.

use crate::control::{Attachment, Connected, Error, Peer, check_id, check_size};
use crate::nbd::client::{self, Described};
use crate::nbd::tls::Identity;
use crate::volumes::ExportName;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

/// Most connected volumes on one host.
const CONNECTED_MAX: usize = 4096;
/// Bytes on their way in each direction of one connection.
const BUFFER_BYTES: usize = 256 << 10;

type Key = (String, String);

struct Bridge {
    generation: u64,
    task: JoinHandle<()>,
}

/// The connected volumes of one host.
pub(crate) struct Remotes {
    identity: Identity,
    runtime: Handle,
    bridges: Mutex<HashMap<Key, Bridge>>,
}

impl Remotes {
    pub(crate) fn new(identity: Identity, runtime: Handle) -> Self {
        Self { identity, runtime, bridges: Mutex::new(HashMap::new()) }
    }

    /// Connects to a volume at its home; gives the guest's end and the home's epoch.
    pub(crate) fn connect(
        &self,
        attachment: &Attachment,
        size_bytes: u64,
        home: &Peer,
    ) -> Result<(OwnedFd, u64), Error> {
        check_id("volume", &attachment.volume_id)?;
        check_id("server", &attachment.server_id)?;
        check_size("volume", size_bytes)?;
        self.disconnect(&attachment.volume_id, &attachment.server_id)?;
        let name = ExportName {
            volume_id: attachment.volume_id.clone(),
            generation: attachment.generation,
            server_id: attachment.server_id.clone(),
        };
        let export = name.to_string();
        let (stream, Described { info, epoch }) =
            self.runtime.block_on(client::connect(&self.identity, home, &export))?;
        if info.size_bytes != size_bytes {
            return Err(Error::invalid(format!(
                "volume {} has {} bytes at its home, not {size_bytes}",
                name.volume_id, info.size_bytes
            )));
        }
        let failed = |error| Error::io("make a socket for a volume", error);
        let (ours, guests) = UnixStream::pair().map_err(failed)?;
        ours.set_nonblocking(true).map_err(failed)?;
        let ours = {
            let _runtime = self.runtime.enter();
            tokio::net::UnixStream::from_std(ours).map_err(failed)?
        };
        let mut bridges = self.bridges();
        bridges.retain(|_, bridge| !bridge.task.is_finished());
        if bridges.len() >= CONNECTED_MAX {
            return Err(Error::invalid(format!(
                "this host has {CONNECTED_MAX} connected volumes, its limit"
            )));
        }
        let task = self.runtime.spawn(carry(ours, stream, export));
        let key = (name.volume_id, name.server_id);
        bridges.insert(key, Bridge { generation: name.generation, task });
        Ok((guests.into(), epoch))
    }

    /// Closes a connection, if there is one.
    pub(crate) fn disconnect(&self, volume_id: &str, server_id: &str) -> Result<(), Error> {
        check_id("volume", volume_id)?;
        check_id("server", server_id)?;
        let bridge = self.bridges().remove(&(volume_id.to_owned(), server_id.to_owned()));
        if let Some(bridge) = bridge {
            bridge.task.abort();
            // It ends by being aborted or has ended before: either way it holds no socket now.
            let _ = self.runtime.block_on(bridge.task);
        }
        Ok(())
    }

    /// What is connected.
    pub(crate) fn list(&self) -> Vec<Connected> {
        let mut connected: Vec<Connected> = self
            .bridges()
            .iter()
            .filter(|(_, bridge)| !bridge.task.is_finished())
            .map(|((volume_id, server_id), bridge)| Connected {
                volume_id: volume_id.clone(),
                server_id: server_id.clone(),
                generation: bridge.generation,
            })
            .collect();
        connected.sort_by(|a, b| (&a.volume_id, &a.server_id).cmp(&(&b.volume_id, &b.server_id)));
        connected
    }

    fn bridges(&self) -> MutexGuard<'_, HashMap<Key, Bridge>> {
        self.bridges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn carry(
    mut guest: tokio::net::UnixStream,
    mut home: crate::nbd::tls::ClientStream,
    export: String,
) {
    let carried =
        tokio::io::copy_bidirectional_with_sizes(&mut guest, &mut home, BUFFER_BYTES, BUFFER_BYTES)
            .await;
    match carried {
        Ok((written_bytes, read_bytes)) => {
            tracing::info!(export, written_bytes, read_bytes, "volume's connection closed");
        }
        Err(error) => tracing::error!(export, %error, "volume's connection lost"),
    }
}
