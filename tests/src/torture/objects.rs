//! Clients that make, join and remove servers and volumes, and the book of what they were promised.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::Method;
use serde_json::{Value, json};

use super::api::{Api, Reply, id};
use super::ground::Made;
use super::journal::Journal;
use crate::random::Random;

/// Servers and volumes of one client at a time.
const SERVERS_MAX: usize = 2;
const VOLUMES_MAX: usize = 2;

/// Whether something was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Done {
    No,
    /// It was asked for, and nobody knows.
    Perhaps,
    Yes,
}

/// What is remembered of a volume's attachments, for a finding; older ones go.
const TOLD_MAX: usize = 40;

/// Where a volume shall be. What was lost may still be done much later, by a node that was stopped.
#[derive(Clone, Debug, Default)]
pub(super) struct Attachment {
    /// The server that was promised, by id.
    pub(super) promised: Option<String>,
    /// Servers to which it was to be attached, in requests that were lost.
    pub(super) perhaps_to: BTreeSet<String>,
    /// Servers from which it was to be detached, in requests that were lost.
    pub(super) perhaps_from: BTreeSet<String>,
    /// What was asked and answered.
    pub(super) told: VecDeque<String>,
}

impl Attachment {
    fn tell(&mut self, journal: &Journal, what: &str, server: &str, reply: &Reply) {
        if self.told.len() == TOLD_MAX {
            self.told.pop_front();
        }
        let at = journal.now() / 1_000_000;
        let came = match reply {
            Reply::Answer(status, _) => status.to_string(),
            Reply::NotSent(_) => "not sent".to_owned(),
            Reply::Lost(_) => "lost".to_owned(),
        };
        self.told.push_back(format!("{at} ms {what} {server}: {came}"));
    }

    /// Whether a volume may be attached to this server, or to none.
    pub(super) fn admits(&self, server: Option<&str>) -> bool {
        match (server, &self.promised) {
            (Some(server), promised) => {
                promised.as_deref() == Some(server) || self.perhaps_to.contains(server)
            }
            (None, Some(promised)) => self.perhaps_from.contains(promised),
            (None, None) => true,
        }
    }
}

/// A server or a volume that a client asked for.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) client: usize,
    pub(super) name: String,
    pub(super) id: Option<String>,
    pub(super) made: Done,
    pub(super) removed: Done,
    /// Of a volume.
    pub(super) attachment: Attachment,
}

impl Entry {
    fn is_known(&self) -> bool {
        self.made == Done::Yes && self.removed == Done::No
    }
}

/// All that was asked for.
#[derive(Default)]
pub(super) struct Book {
    pub(super) servers: Vec<Entry>,
    pub(super) volumes: Vec<Entry>,
}

/// A client that makes and removes objects.
pub(super) struct Builder {
    pub(super) client: usize,
    pub(super) api: Api,
    pub(super) journal: Arc<Journal>,
    pub(super) made: Arc<Made>,
    pub(super) random: Random,
    serial: usize,
}

impl Builder {
    pub(super) fn new(
        client: usize,
        api: Api,
        journal: Arc<Journal>,
        made: Arc<Made>,
        random: Random,
    ) -> Builder {
        Builder { client, api, journal, made, random, serial: 0 }
    }

    /// Works until the end.
    pub(super) async fn work(mut self) {
        while !self.journal.is_stopping() {
            self.one().await;
            let pause = self.random.between(200, 900);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    async fn one(&mut self) {
        let servers = self.known(|book| &book.servers);
        let volumes = self.known(|book| &book.volumes);
        match self.random.below(10) {
            0..=1 if servers.len() < SERVERS_MAX => self.make_server().await,
            2..=3 if volumes.len() < VOLUMES_MAX => self.make_volume().await,
            4..=5 if !servers.is_empty() && !volumes.is_empty() => {
                let server = self.random.pick(&servers).clone();
                let volume = self.random.pick(&volumes).clone();
                self.attach(&server, &volume).await;
            }
            6 if !volumes.is_empty() => {
                let volume = self.random.pick(&volumes).clone();
                self.detach(&volume).await;
            }
            7 if !servers.is_empty() => {
                let server = self.random.pick(&servers).clone();
                self.remove_server(&server).await;
            }
            8 if !volumes.is_empty() => {
                let volume = self.random.pick(&volumes).clone();
                self.remove_volume(&volume).await;
            }
            _ => self.find_lost().await,
        }
    }

    fn known(&self, of: impl Fn(&Book) -> &Vec<Entry>) -> Vec<Entry> {
        let entries = self.journal.entries();
        let own = of(&entries.book).iter().filter(|entry| entry.client == self.client);
        own.filter(|entry| entry.is_known()).cloned().collect()
    }

    fn name(&mut self, kind: &str) -> String {
        self.serial += 1;
        format!("{kind}-{}-{}", self.client, self.serial)
    }

    fn volumes_path(&self) -> String {
        format!("/volume/v3/{}/volumes", self.made.project)
    }

    async fn make_server(&mut self) {
        let name = self.name("server");
        let body = server(&self.made, &name, "print hello\nsleep 86400", None);
        let reply = self.api.call(Method::POST, "/compute/v2.1/servers", Some(&body)).await;
        self.journal.count("create server", &reply);
        let entry = self.entry(name, &reply);
        self.journal.entries().book.servers.extend(entry);
    }

    async fn make_volume(&mut self) {
        let name = self.name("volume");
        let body = json!({"volume": {"name": name, "size": 1}});
        let reply = self.api.call(Method::POST, &self.volumes_path(), Some(&body)).await;
        self.journal.count("create volume", &reply);
        let entry = self.entry(name, &reply);
        self.journal.entries().book.volumes.extend(entry);
    }

    /// The entry of something asked for, where it may be there.
    fn entry(&self, name: String, reply: &Reply) -> Option<Entry> {
        let (id, made) = match reply {
            Reply::Answer(status, body) if *status < 300 => (id(body).ok(), Done::Yes),
            Reply::Lost(_) => (None, Done::Perhaps),
            _ => return None,
        };
        let (client, removed) = (self.client, Done::No);
        Some(Entry { client, name, id, made, removed, attachment: Attachment::default() })
    }

    async fn attach(&self, server: &Entry, volume: &Entry) {
        let (Some(server), Some(volume)) = (&server.id, &volume.id) else { return };
        let path = format!("/compute/v2.1/servers/{server}/os-volume_attachments");
        let body = json!({"volumeAttachment": {"volumeId": volume}});
        let reply = self.api.call(Method::POST, &path, Some(&body)).await;
        self.journal.count("attach", &reply);
        self.note_attachment(volume, |journal, attachment| {
            attachment.tell(journal, "attach", server, &reply);
            match &reply {
                Reply::Answer(status, _) if *status < 300 => {
                    attachment.promised = Some(server.clone());
                }
                Reply::Lost(_) => drop(attachment.perhaps_to.insert(server.clone())),
                _ => {}
            }
        });
    }

    async fn detach(&self, volume: &Entry) {
        let (Some(id), Some(server)) = (&volume.id, &volume.attachment.promised) else { return };
        let path = format!("/compute/v2.1/servers/{server}/os-volume_attachments/{id}");
        let reply = self.api.call(Method::DELETE, &path, None).await;
        self.journal.count("detach", &reply);
        self.note_attachment(id, |journal, attachment| {
            attachment.tell(journal, "detach", server, &reply);
            match &reply {
                Reply::Answer(status, _) if *status < 300 => attachment.promised = None,
                Reply::Lost(_) => drop(attachment.perhaps_from.insert(server.clone())),
                _ => {}
            }
        });
    }

    fn note_attachment(&self, volume: &str, note: impl Fn(&Journal, &mut Attachment)) {
        let mut entries = self.journal.entries();
        let volumes = entries.book.volumes.iter_mut();
        volumes
            .filter(|entry| entry.id.as_deref() == Some(volume))
            .for_each(|entry| note(&self.journal, &mut entry.attachment));
    }

    async fn remove_server(&self, server: &Entry) {
        let Some(id) = &server.id else { return };
        let path = format!("/compute/v2.1/servers/{id}");
        let reply = self.api.call(Method::DELETE, &path, None).await;
        self.journal.count("delete server", &reply);
        let Some(removed) = removed(&reply) else { return };
        let mut entries = self.journal.entries();
        for entry in entries.book.servers.iter_mut().filter(|entry| entry.id.as_ref() == Some(id)) {
            entry.removed = removed;
        }
        // Whatever was asked about a server that is gone, its volumes are free.
        for attachment in entries.book.volumes.iter_mut().map(|volume| &mut volume.attachment) {
            if attachment.promised.as_ref() != Some(id) {
                continue;
            }
            attachment.tell(&self.journal, "delete server", id, &reply);
            if removed == Done::Yes {
                attachment.promised = None;
            } else {
                attachment.perhaps_from.insert(id.clone());
            }
        }
    }

    async fn remove_volume(&self, volume: &Entry) {
        let (Some(id), None) = (&volume.id, &volume.attachment.promised) else { return };
        let reply =
            self.api.call(Method::DELETE, &format!("{}/{id}", self.volumes_path()), None).await;
        self.journal.count("delete volume", &reply);
        let Some(removed) = removed(&reply) else { return };
        let mut entries = self.journal.entries();
        let volumes = entries.book.volumes.iter_mut();
        volumes
            .filter(|entry| entry.id.as_ref() == Some(id))
            .for_each(|entry| entry.removed = removed);
    }

    /// Looks for objects whose creation was lost, so that they are used after all.
    async fn find_lost(&self) {
        let servers = self.api.call(Method::GET, "/compute/v2.1/servers", None).await;
        let volumes = self.api.call(Method::GET, &self.volumes_path(), None).await;
        self.journal.count("list", &servers);
        self.journal.count("list", &volumes);
        let mut entries = self.journal.entries();
        let book = &mut entries.book;
        for (reply, kind, known) in
            [(servers, "servers", &mut book.servers), (volumes, "volumes", &mut book.volumes)]
        {
            let Reply::Answer(200, body) = reply else { continue };
            let lost = known.iter_mut().filter(|entry| {
                entry.client == self.client && entry.made == Done::Perhaps && entry.id.is_none()
            });
            for entry in lost {
                let rows = body[kind].as_array().into_iter().flatten();
                if let Some(found) = rows.clone().find(|row| row["name"] == entry.name.as_str()) {
                    entry.id = found["id"].as_str().map(str::to_owned);
                    entry.made = Done::Yes;
                }
            }
        }
    }
}

fn removed(reply: &Reply) -> Option<Done> {
    match reply {
        Reply::Answer(status, _) if *status < 300 => Some(Done::Yes),
        Reply::Lost(_) => Some(Done::Perhaps),
        _ => None,
    }
}

/// What makes a server with a list of steps, where asked on one host.
pub(super) fn server(made: &Made, name: &str, steps: &str, host: Option<&str>) -> Value {
    let mut body = json!({"server": {
        "name": name, "imageRef": made.image, "flavorRef": made.flavor,
        "networks": [{"uuid": made.network}], "config_drive": true,
        "user_data": STANDARD.encode(format!("#trine-steps\n{steps}\n")),
    }});
    if let Some(host) = host {
        body["server"]["availability_zone"] = json!(format!("nova:{host}"));
    }
    body
}
