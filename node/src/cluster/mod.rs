//! Three nodes on this machine, made with exactly what a user of three hosts runs: `trine init`,
//! `trine join-token`, `trine join`, `trine node`, each as a process of its own.

mod member;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::client::{Client, Credentials};

pub(crate) use member::Member;

/// Nodes of a local cluster.
pub(crate) const NODES: usize = 3;

/// Loopback addresses of a local cluster: `127.a.b.1` … for its nodes, `127.a.(b+1).0/24` for
/// floating addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Addresses {
    second: u8,
    third: u8,
}

impl Addresses {
    /// What `trine up` uses, so that its URL can be remembered.
    pub(crate) const DEFAULT: Addresses = Addresses { second: 77, third: 0 };

    /// Addresses for a cluster that nobody needs to remember, distinct for each process.
    pub(crate) fn of_process(pid: u32) -> Addresses {
        Addresses { second: 78 + (pid % 128) as u8, third: (pid / 128 % 127) as u8 * 2 }
    }

    /// A node's address, the first with index 0.
    pub(crate) fn node_address(self, index: usize) -> std::net::Ipv4Addr {
        // Never more nodes than a few.
        std::net::Ipv4Addr::new(127, self.second, self.third, index as u8 + 1)
    }

    fn node(self, index: usize) -> String {
        self.node_address(index).to_string()
    }

    fn floating_pool(self) -> String {
        format!("127.{}.{}.0/24", self.second, self.third + 1)
    }
}

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "127.{}.{}", self.second, self.third)
    }
}

impl FromStr for Addresses {
    type Err = String;

    fn from_str(text: &str) -> Result<Addresses, String> {
        let parsed = text.strip_prefix("127.").and_then(|rest| rest.split_once('.'));
        let parsed = parsed.and_then(|(b, c)| Some((b.parse().ok()?, c.parse().ok()?)));
        match parsed {
            Some((second, third)) if third < 255 => Ok(Addresses { second, third }),
            _ => Err(format!("{text:?} is not of the form 127.A.B with B below 255")),
        }
    }
}

/// A cluster of three nodes below one directory.
pub(crate) struct Cluster {
    directory: PathBuf,
    members: Vec<Member>,
}

impl Cluster {
    /// The members' directories below `directory`, made or not.
    pub(crate) fn at(directory: &Path, addresses: Addresses) -> Result<Cluster> {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot make the directory {}", directory.display()))?;
        let directory = directory.canonicalize()?;
        let members = (0..NODES)
            .map(|index| {
                let name = format!("node{}", index + 1);
                Member::new(name, addresses.node(index), &directory)
            })
            .collect();
        Ok(Cluster { directory, members })
    }

    /// Whether the cluster was made before: every member has its data directory.
    pub(crate) fn exists(&self) -> bool {
        self.members.iter().all(Member::is_made)
    }

    /// Makes the first node's authority and data directory, and starts it.
    pub(crate) async fn make_first(&mut self, addresses: Addresses) -> Result<()> {
        let pool = addresses.floating_pool();
        let first = &mut self.members[0];
        first
            .trine(
                &[
                    "init",
                    "--address",
                    &first.address,
                    "--name",
                    &first.name,
                    "--floating-pool",
                    &pool,
                ],
                None,
            )
            .await?;
        first.start().await
    }

    /// Lets the member `index` join with a one-time token of the first, and starts it.
    pub(crate) async fn join(&mut self, index: usize) -> Result<()> {
        let answer = self.members[0].trine(&["join-token", "--json"], None).await?;
        let answer: Value = serde_json::from_str(&answer).context("join-token printed no JSON")?;
        let token = crate::client::text(&answer, "/token")?;
        let member = &mut self.members[index];
        let arguments =
            ["join", "--address", &member.address, "--name", &member.name, "--token-file", "-"];
        member.trine(&arguments, Some(&token)).await?;
        member.start().await
    }

    /// Starts every member that was made before.
    pub(crate) async fn start(&mut self) -> Result<()> {
        // A single node has no quorum and is not ready before a second one runs.
        let starts = self.members.iter_mut().map(Member::start);
        futures::future::try_join_all(starts).await.map(drop)
    }

    /// The members, first to last.
    pub(crate) fn members(&self) -> &[Member] {
        &self.members
    }

    /// One member.
    pub(crate) fn member_mut(&mut self, index: usize) -> &mut Member {
        &mut self.members[index]
    }

    /// The cluster's directory.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Credentials of the administrator, as the first node keeps them.
    pub(crate) fn credentials(&self) -> Result<Credentials> {
        Credentials::read(&self.members[0].data_directory.join("credentials.json"))
    }

    /// Signs in at the first node.
    pub(crate) async fn client(&self) -> Result<Client> {
        Client::sign_in(&self.credentials()?).await
    }

    /// The index of the member that leads, as a member that runs sees it.
    pub(crate) async fn leader(&self) -> Result<usize> {
        let start = Instant::now();
        loop {
            for member in self.members.iter().filter(|member| member.is_running()) {
                let status = member.status().await?;
                let leader = status["leader"].as_u64();
                let index = leader.and_then(|id| usize::try_from(id).ok()?.checked_sub(1));
                if index.is_some_and(|index| self.is_running(index)) {
                    return index.context("the line above looked at it");
                }
            }
            if start.elapsed() > Duration::from_secs(20) {
                bail!("no leader after 20 s; see {}/node*/log", self.directory.display());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn is_running(&self, index: usize) -> bool {
        self.members.get(index).is_some_and(Member::is_running)
    }

    /// Stops the node processes; guests, switches and storage go on.
    pub(crate) async fn stop_nodes(&mut self) -> Result<()> {
        for member in &mut self.members {
            member.terminate().await?;
        }
        Ok(())
    }

    /// Ends everything that belongs to the cluster: guests, switches, storage and nodes.
    pub(crate) async fn end(&mut self) -> Result<()> {
        let mut first_error = None;
        for member in &mut self.members {
            if let Err(error) = member.end().await {
                first_error.get_or_insert(error);
            }
        }
        first_error.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::Addresses;

    #[test]
    fn every_process_gets_loopback_addresses_apart_from_the_default() {
        for pid in [1, 127, 128, 4_194_304, u32::MAX] {
            let addresses = Addresses::of_process(pid);
            assert_ne!(addresses, Addresses::DEFAULT);
            let parsed: std::net::Ipv4Addr = addresses.node(0).parse().unwrap();
            assert!(parsed.is_loopback());
            assert_eq!(addresses.to_string().parse(), Ok(addresses));
            assert!(addresses.floating_pool().parse::<ipnet::Ipv4Net>().is_ok());
        }
        for wrong in ["10.0.0", "127.1", "127.1.255", "127.1.2.3", ""] {
            assert!(wrong.parse::<Addresses>().is_err(), "{wrong}");
        }
    }
}
