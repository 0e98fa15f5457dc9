//! Our cluster of three processes, and how its load looks.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::{Buf, BytesMut};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::load::Wire;
use super::member::{self, MemberFile};
use crate::files::{Access, write_new};
use crate::pki::{Authority, NodeIdentity, NodeKey};

const RAFT_PORT: u16 = 8775;
const LOAD_PORT: u16 = 8790;
/// How long a member may take to be ready.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// Three members.
pub(super) struct Members {
    processes: Vec<Child>,
    /// Where the leader takes load.
    pub(super) leader: SocketAddr,
}

impl Members {
    /// Makes a cluster below `directory`. The first member leads: the others are added to it.
    pub(super) async fn start(
        directory: &Path,
        addresses: [std::net::IpAddr; 3],
    ) -> Result<Members> {
        let cluster = uuid::Uuid::new_v4();
        let authority = Authority::create(&cluster.simple().to_string())?;
        let at = |index: usize, port| SocketAddr::new(addresses[index], port);
        let mut processes = Vec::new();
        for index in [1, 2, 0] {
            let node_id = index as u64 + 1;
            let identity = NodeIdentity {
                cluster_id: cluster.simple().to_string(),
                node_id,
                address: addresses[index],
            };
            let key = NodeKey::create()?;
            let others = if index == 0 {
                vec![(2, at(1, RAFT_PORT)), (3, at(2, RAFT_PORT))]
            } else {
                vec![]
            };
            let file = MemberFile {
                cluster_id: *cluster.as_bytes(),
                node_id,
                directory: directory.join(format!("trine{node_id}")),
                listen: at(index, RAFT_PORT),
                load: at(index, LOAD_PORT),
                ca: authority.certificate_pem.clone(),
                certificate: authority.issue(&key.public_key, &identity)?,
                key: key.key_pem.clone(),
                others,
            };
            let path = directory.join(format!("trine{node_id}.json"));
            write_new(&path, &serde_json::to_vec(&file)?, Access::Secret)?;
            processes.push(start(&path).await?);
        }
        Ok(Members { processes, leader: at(0, LOAD_PORT) })
    }

    /// Ends them.
    pub(super) async fn end(mut self) {
        for process in &mut self.processes {
            let _ = process.kill().await;
        }
    }
}

async fn start(config: &Path) -> Result<Child> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["bench", "consensus-member"])
        .arg(config)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let output = child.stdout.take().context("its output is piped")?;
    let mut lines = BufReader::new(output).lines();
    let line = tokio::time::timeout(READY_WITHIN, lines.next_line()).await;
    match line.context("a member of the benchmark is not ready in time")?? {
        Some(line) if line == "ready" => Ok(child),
        _ => bail!("a member of the benchmark ended before it was ready"),
    }
}

/// A connection that proposes.
pub(super) struct Proposals {
    at: SocketAddr,
    number: u64,
}

impl Proposals {
    /// To a member.
    pub(super) fn new(at: SocketAddr, first: u64) -> Proposals {
        Proposals { at, number: first }
    }
}

impl Wire for Proposals {
    fn open(&mut self, _out: &mut Vec<u8>) {}

    fn request(&mut self, writer: usize, out: &mut Vec<u8>) {
        self.number += 1;
        let command = member::command(self.at, self.number);
        out.extend((command.len() as u32).to_be_bytes());
        out.extend((writer as u32).to_be_bytes());
        out.extend(command);
    }

    fn take(
        &mut self,
        input: &mut BytesMut,
        _out: &mut Vec<u8>,
        done: &mut Vec<usize>,
    ) -> Result<()> {
        while input.len() >= 4 {
            done.push(input.get_u32() as usize);
        }
        Ok(())
    }
}
