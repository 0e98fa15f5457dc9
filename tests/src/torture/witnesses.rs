//! Guests that were there before the faults and must be there after them: one on each host, each
//! writing round after round to a volume, on its own host or on another one.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::api::id;
use super::ground::{Ground, Made};
use super::objects;
use super::registers::INITIAL;
use super::seat::Seat;

const PATIENCE: Duration = Duration::from_secs(120);
/// A guest takes 256 steps: one wait, then a write and a sleep a round.
const ROUNDS: u64 = 127;
/// Bytes of each write.
const WRITTEN_BYTES: usize = 8192;
/// Steps before the first write.
const STEPS_BEFORE: u64 = 1;

/// A guest that must not be harmed.
#[derive(Clone, Debug)]
pub(super) struct Witness {
    /// Its host, 0 to 2.
    pub(super) host: usize,
    pub(super) server: String,
    pub(super) volume: String,
    /// The volume's host, 0 to 2.
    pub(super) home: usize,
    /// Its process and generation, as the host's node says.
    identity: Value,
    /// It was found so once, and is looked at no more.
    pub(super) harmed: bool,
}

/// Starts the witnesses; their rounds last at least as long as the run.
pub(super) fn start(
    ground: &Ground,
    seat: &Seat,
    made: &Made,
    duration: Duration,
) -> Result<Vec<Witness>> {
    let mut homes = volumes(ground, seat, made)?;
    // The last rounds come after the faults, however long it takes then to settle.
    let pause = (duration.as_secs_f64() * 1.3 + 300.0) / ROUNDS as f64;
    let mut witnesses = Vec::new();
    for host in 0..ground.hosts.len() {
        // The first one has its volume at hand, the others on another host if there is one.
        let wanted = |home: &usize| (*home == host) == (host == 0);
        let chosen = homes.iter().position(|(_, home)| wanted(home)).unwrap_or(0);
        let (volume, home) = homes.remove(chosen);
        let server = boot(ground, seat, made, host, &volume, pause)?;
        let identity = Value::Null;
        witnesses.push(Witness { host, server, volume, home, identity, harmed: false });
    }
    for witness in &mut witnesses {
        wait_for_first_write(seat, witness)?;
        witness.identity = witness.observe(ground)?;
    }
    Ok(witnesses)
}

fn volumes(ground: &Ground, seat: &Seat, made: &Made) -> Result<Vec<(String, usize)>> {
    let api = seat.api.clone();
    let path = format!("/volume/v3/{}/volumes", made.project);
    let names: Vec<String> = ground.hosts.iter().map(|host| host.name.clone()).collect();
    seat.run(async move {
        let mut homes = Vec::new();
        for number in 0..names.len() {
            let body = json!({"volume": {
                "name": format!("witness-{number}"), "description": INITIAL, "size": 1,
            }});
            let volume = id(&api.post(&path, body).await?)?;
            let home = loop {
                let found = api.get(&format!("{path}/{volume}")).await?;
                let found = &found["volume"];
                if found["status"] == "available" {
                    let host = found["os-vol-host-attr:host"].as_str().unwrap_or_default();
                    let home = names.iter().position(|name| host.starts_with(name.as_str()));
                    break home.with_context(|| format!("volume without a host: {found}"))?;
                }
                ensure!(found["status"] == "creating", "{found}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            };
            homes.push((volume, home));
        }
        Ok(homes)
    })
}

fn boot(
    ground: &Ground,
    seat: &Seat,
    made: &Made,
    host: usize,
    volume: &str,
    pause: f64,
) -> Result<String> {
    let serial = &volume[..20];
    let mut steps = format!("disk-wait {serial} timeout=600\n");
    for round in 1..=ROUNDS {
        let pattern = pattern(round);
        steps += &format!(
            "disk-write {serial} pattern={pattern} bytes={WRITTEN_BYTES}\nsleep {pause:.2}\n"
        );
    }
    let name = format!("witness-{host}");
    let body = objects::server(made, &name, &steps, Some(&ground.hosts[host].name));
    let api = seat.api.clone();
    let volume = volume.to_owned();
    seat.run(async move {
        let server = id(&api.post("/compute/v2.1/servers", body).await?)?;
        let path = format!("/compute/v2.1/servers/{server}");
        loop {
            let found = api.get(&path).await?;
            match found["server"]["status"].as_str() {
                Some("ACTIVE") => break,
                Some("BUILD") => tokio::time::sleep(Duration::from_millis(100)).await,
                _ => bail!("a witness did not start: {found}"),
            }
        }
        let attach = format!("{path}/os-volume_attachments");
        api.post(&attach, json!({"volumeAttachment": {"volumeId": volume}})).await?;
        Ok(server)
    })
}

/// What a round writes, over and over. Four characters, so that every sector looks alike.
fn pattern(round: u64) -> String {
    format!("r{round:03}")
}

fn wait_for_first_write(seat: &Seat, witness: &Witness) -> Result<()> {
    let (api, server) = (seat.api.clone(), witness.server.clone());
    let written = async move {
        loop {
            let log = api.console(&server).await?;
            if acknowledged(&log) > 0 {
                return Ok(());
            }
            ensure!(!log.contains("failed"), "a witness failed at once:\n{log}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    seat.run(async move {
        tokio::time::timeout(PATIENCE, written).await.context("a witness does not write")?
    })
}

/// The last round whose write the guest was told to be durable.
fn acknowledged(log: &str) -> u64 {
    let mut steps = log.lines().filter_map(|line| {
        let (number, rest) = line.strip_prefix("trine: step ")?.split_once(' ')?;
        rest.starts_with("disk-write ok").then(|| number.parse::<u64>().ok())?
    });
    steps.next_back().map_or(0, |step| (step - STEPS_BEFORE).div_ceil(2))
}

impl Witness {
    /// Process and generation, from the node of its host.
    fn observe(&self, ground: &Ground) -> Result<Value> {
        let status = ground.hosts[self.host].status()?;
        let guests = status["guests"].as_array().context("guests")?;
        let own = guests.iter().find(|guest| guest["id"] == self.server.as_str());
        let own = own.with_context(|| {
            format!("host{} does not know its witness: {status}", self.host + 1)
        })?;
        Ok(json!({"pid": own["pid"], "generation": own["generation"], "state": own["state"]}))
    }

    /// What is wrong with it while it should run.
    pub(super) fn examine(&self, ground: &Ground, seat: &Seat) -> Result<Vec<String>> {
        let mut findings = Vec::new();
        let who = format!("the witness on host{} ({})", self.host + 1, self.server);
        let identity = self.observe(ground)?;
        if identity != self.identity {
            findings.push(format!("{who} was {} and is {identity}", self.identity));
        }
        let path = format!("/compute/v2.1/servers/{}", self.server);
        let found = seat.get_patiently(path, PATIENCE)?;
        if found["server"]["status"] != "ACTIVE" {
            findings.push(format!("{who} is {}", found["server"]["status"]));
        }
        let log = self.console(seat)?;
        for line in log.lines() {
            if line.contains("failed") || line.contains("panic") || line.contains("fault") {
                findings.push(format!("{who} says: {line}"));
            }
        }
        if log.matches("trine: booted").count() != 1 {
            findings.push(format!("{who} did not boot once:\n{log}"));
        }
        Ok(findings)
    }

    /// The last round that its console acknowledges.
    pub(super) fn round(&self, seat: &Seat) -> Result<u64> {
        Ok(acknowledged(&self.console(seat)?))
    }

    fn console(&self, seat: &Seat) -> Result<String> {
        let (api, server) = (seat.api.clone(), self.server.clone());
        seat.run(async move { api.console(&server).await })
    }

    /// Whether the volume holds what the guest was told to be durable, once the guest is gone.
    pub(super) fn compare(&self, ground: &Ground, round: u64) -> Result<Vec<String>> {
        let path = format!("storage/volumes/{}/data", self.volume);
        let path = ground.hosts[self.home].data(&path);
        let mut content = vec![0; WRITTEN_BYTES];
        let mut file = std::fs::File::open(&path)
            .with_context(|| format!("cannot open the volume {}", path.display()))?;
        std::io::Read::read_exact(&mut file, &mut content)?;
        let mut sectors: BTreeMap<String, usize> = BTreeMap::new();
        for sector in content.chunks(512) {
            *sectors.entry(String::from_utf8_lossy(&sector[..4]).into_owned()).or_default() += 1;
        }
        // The round after the last acknowledged one may have been under way.
        let right = |found: &String| *found == pattern(round) || *found == pattern(round + 1);
        if sectors.keys().all(right) {
            return Ok(Vec::new());
        }
        Ok(vec![format!(
            "volume {} of host{}: the guest was told that round {round} is durable, and the disk \
             holds {sectors:?}",
            self.volume,
            self.home + 1
        )])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_acknowledged_round_is_read_from_the_console() {
        assert_eq!(acknowledged("trine: booted 1\ntrine: step 1 disk-wait ok\n"), 0);
        let log = "trine: step 2 disk-write ok 8192\ntrine: step 3 sleep ok\n";
        assert_eq!(acknowledged(log), 1);
        assert_eq!(acknowledged(&format!("{log}trine: step 4 disk-write ok\n")), 2);
        assert_eq!(acknowledged(&format!("{log}trine: step 4 disk-write failed no\n")), 1);
    }
}
