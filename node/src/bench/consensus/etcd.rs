//! Three local members of the machine's etcd.

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

const CLIENT_PORT: u16 = 2379;
const PEER_PORT: u16 = 2380;
/// How long the members may take to have a leader.
const LEADER_WITHIN: Duration = Duration::from_secs(30);
/// How long one may take to say who leads.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Three members.
pub(super) struct Members {
    processes: Vec<Child>,
    /// Where the leader takes clients.
    pub(super) leader: SocketAddr,
}

/// etcd's executable, where it is installed, and its version.
pub(super) async fn installed() -> Option<(PathBuf, String)> {
    let paths = std::env::var_os("PATH")?;
    let path = std::env::split_paths(&paths).map(|path| path.join("etcd")).find(|p| p.is_file())?;
    let output = Command::new(&path).arg("--version").output().await.ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.lines().next()?.trim().to_owned();
    Some((path, version))
}

impl Members {
    /// Makes a cluster below `directory`.
    pub(super) async fn start(
        program: &Path,
        directory: &Path,
        addresses: [IpAddr; 3],
    ) -> Result<Members> {
        let peer = |address: IpAddr| format!("http://{}", SocketAddr::new(address, PEER_PORT));
        let client = |address: IpAddr| format!("http://{}", SocketAddr::new(address, CLIENT_PORT));
        let cluster: Vec<String> = addresses
            .iter()
            .enumerate()
            .map(|(index, address)| format!("etcd{}={}", index + 1, peer(*address)))
            .collect();
        let mut processes = Vec::new();
        for (index, address) in addresses.iter().enumerate() {
            let name = format!("etcd{}", index + 1);
            let log = File::create(directory.join(format!("{name}.log")))?;
            let child = Command::new(program)
                .args(["--name", &name, "--log-level", "error", "--data-dir"])
                .arg(directory.join(&name))
                .args(["--listen-client-urls", &client(*address)])
                .args(["--advertise-client-urls", &client(*address)])
                .args(["--listen-peer-urls", &peer(*address)])
                .args(["--initial-advertise-peer-urls", &peer(*address)])
                .args(["--initial-cluster", &cluster.join(",")])
                .args(["--initial-cluster-state", "new"])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(log)
                .kill_on_drop(true)
                .spawn()
                .with_context(|| format!("cannot start {}", program.display()))?;
            processes.push(child);
        }
        let leader = leader(addresses).await?;
        Ok(Members { processes, leader })
    }

    /// Ends them.
    pub(super) async fn end(mut self) {
        for process in &mut self.processes {
            let _ = process.kill().await;
        }
    }
}

async fn leader(addresses: [IpAddr; 3]) -> Result<SocketAddr> {
    let started = Instant::now();
    loop {
        for address in addresses {
            let at = SocketAddr::new(address, CLIENT_PORT);
            let asked = tokio::time::timeout(ANSWER_WITHIN, status(at)).await;
            let Ok(Ok(status)) = asked else { continue };
            let leader = status["leader"].as_str().filter(|leader| *leader != "0");
            if leader.is_some() && leader == status["header"]["member_id"].as_str() {
                return Ok(at);
            }
        }
        if started.elapsed() > LEADER_WITHIN {
            bail!("etcd has no leader after {} s", LEADER_WITHIN.as_secs());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// `/v3/maintenance/status` by etcd's JSON gateway.
async fn status(at: SocketAddr) -> Result<Value> {
    let mut stream = TcpStream::connect(at).await?;
    let request = format!(
        "POST /v3/maintenance/status HTTP/1.1\r\nhost: {at}\r\ncontent-length: 2\r\n\
         connection: close\r\n\r\n{{}}"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let body = answer.find('{').zip(answer.rfind('}'));
    let (start, end) = body.context("etcd answered without a body")?;
    Ok(serde_json::from_str(&answer[start..=end])?)
}
