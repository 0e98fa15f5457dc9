//! The node's local socket, for commands of whoever owns the data directory: `status`,
//! `join-token`, `cluster`. Mode 0600; frames of [`abi::control`] holding JSON.

use super::Node;
use super::administration::{self, ClusterRequest};
use crate::data_directory::DataDirectory;
use crate::runtime_directory;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::io::ErrorKind;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// How long the node may take for an answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// Connections at once.
const CONNECTIONS_MAX: usize = 16;

/// What can be asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum LocalRequest {
    /// How the node is.
    Status,
    /// What concerns the cluster as a whole.
    Cluster(ClusterRequest),
    /// A one-time token for a host to join with.
    JoinToken {
        /// How long it may be used.
        ttl_seconds: u64,
    },
}

/// Path of the socket.
pub(crate) fn socket_path(runtime_directory: &Path) -> PathBuf {
    runtime_directory.join("node.sock")
}

/// Asks the node that runs on a data directory.
pub(crate) fn ask(data_directory: &Path, request: &LocalRequest) -> Result<Value> {
    ask_with(data_directory, request, &[])
}

/// The same with a file that goes along.
pub(crate) fn ask_with(
    data_directory: &Path,
    request: &LocalRequest,
    files: &[BorrowedFd<'_>],
) -> Result<Value> {
    let directory = DataDirectory::open(data_directory)?;
    let path = socket_path(&runtime_directory::path(directory.root()));
    let socket = match UnixStream::connect(&path) {
        Ok(socket) => socket,
        Err(error)
            if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) =>
        {
            let root = directory.root().display();
            bail!("no node runs on {root}; start it with: trine node --data-dir {root}")
        }
        Err(error) => {
            return Err(error).with_context(|| format!("cannot connect to {}", path.display()));
        }
    };
    socket.set_read_timeout(Some(ANSWER_WITHIN))?;
    abi::control::send(&socket, &serde_json::to_vec(request)?, files)?;
    let (answer, _) = abi::control::receive(&socket)
        .context("the node did not answer")?
        .context("the node closed the connection")?;
    let mut answer: Value = serde_json::from_slice(&answer)?;
    match answer["error"].as_str() {
        Some(message) => bail!("{message}"),
        None => Ok(answer["ok"].take()),
    }
}

/// Binds the socket and answers on a thread of its own, until the process ends.
pub(super) fn serve(node: Arc<Node>) -> Result<()> {
    let path = socket_path(&node.runtime_directory);
    // Whoever bound it before is gone: the data directory's lock is ours.
    let _ = std::fs::remove_file(&path);
    let listener =
        UnixListener::bind(&path).with_context(|| format!("cannot bind {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    let runtime = tokio::runtime::Handle::current();
    let connections = Arc::new(AtomicUsize::new(0));
    std::thread::Builder::new().name("trine-local".into()).spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { continue };
            if connections.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
                connections.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let (node, runtime) = (Arc::clone(&node), runtime.clone());
            let connections = Arc::clone(&connections);
            std::thread::spawn(move || {
                if let Err(error) = converse(&node, &runtime, &stream) {
                    tracing::debug!(%error, "a local connection broke");
                }
                connections.fetch_sub(1, Ordering::Relaxed);
            });
        }
    })?;
    Ok(())
}

fn converse(node: &Arc<Node>, runtime: &tokio::runtime::Handle, stream: &UnixStream) -> Result<()> {
    stream.set_read_timeout(Some(ANSWER_WITHIN))?;
    while let Some((request, files)) = abi::control::receive(stream)? {
        let answer = match serde_json::from_slice(&request) {
            Ok(request) => runtime.block_on(answer(node, request, files)),
            Err(error) => Err(anyhow::anyhow!("this node does not know the request: {error}")),
        };
        let answer = match answer {
            Ok(value) => json!({"ok": value}),
            Err(error) => json!({"error": format!("{error:#}")}),
        };
        abi::control::send(stream, &serde_json::to_vec(&answer)?, &[])?;
    }
    Ok(())
}

async fn answer(node: &Arc<Node>, request: LocalRequest, files: Vec<OwnedFd>) -> Result<Value> {
    match request {
        LocalRequest::Status => Ok(super::status::status(node)),
        LocalRequest::JoinToken { ttl_seconds } => {
            super::join_service::issue_token(node, ttl_seconds, None).await
        }
        LocalRequest::Cluster(request) => {
            administration::answer(node, request, files.into_iter().next()).await
        }
    }
}
