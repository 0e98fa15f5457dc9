//! A backup: the whole replicated state as one checksummed file.

use super::super::Node;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;

/// Writes a backup into an open file and syncs it.
pub(super) async fn write(node: &Node, file: OwnedFd) -> Result<Value> {
    let bytes = node.raft()?.backup().await.context("the cluster gave no backup")?;
    let info = raft::read_backup(&bytes).context("the backup does not read back")?;
    let size_bytes = bytes.len();
    let written = tokio::task::spawn_blocking(move || {
        let mut file = File::from(file);
        file.write_all(&bytes)?;
        file.sync_all()
    });
    written.await?.context("cannot write the backup")?;
    Ok(json!({
        "index": info.index,
        "size_bytes": size_bytes,
        "cluster_id": node.config.cluster_id,
        "cluster_key_file": node.directory.join("cluster.key"),
    }))
}
