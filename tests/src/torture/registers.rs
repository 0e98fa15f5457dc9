//! Clients that overwrite and read fields of objects, and take and free names, through all nodes.

use std::sync::Arc;
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use super::api::{Api, Reply};
use super::journal::Journal;
use crate::linearizability::{RegisterAnswer, RegisterCall, SlotAnswer, SlotCall};
use crate::random::Random;

/// What every register holds at first.
pub(super) const INITIAL: &str = "initial";
/// Keypairs to fight for.
const SLOTS: u64 = 3;
const KEYPAIRS: &str = "/compute/v2.1/os-keypairs";
const PUBLIC_KEY: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKnkfwdHUDEM2TgqoGwsL8QRBw6q999iIB24ghp17sb2 torture";

/// A field of an object.
#[derive(Clone, Debug)]
pub(super) struct Field {
    /// Its name in the history.
    pub(super) name: &'static str,
    pub(super) method: Method,
    pub(super) path: String,
    /// Pointer to the value in the object, for reading and for writing.
    pub(super) pointer: &'static [&'static str],
}

impl Field {
    fn body(&self, value: &str) -> Value {
        self.pointer.iter().rev().fold(json!(value), |inner, key| json!({*key: inner}))
    }

    fn value(&self, body: &Value) -> Option<String> {
        let found = self.pointer.iter().try_fold(body, |value, key| value.get(key));
        Some(found?.as_str()?.to_owned())
    }
}

/// Reads and writes fields until the end.
pub(super) async fn fields(
    client: usize,
    api: Api,
    journal: Arc<Journal>,
    fields: Arc<Vec<Field>>,
    mut random: Random,
) {
    let mut written = 0;
    while !journal.is_stopping() {
        let field = random.pick(&fields).clone();
        let reply = if random.chance(50) {
            written += 1;
            write(client, &api, &journal, &field, format!("c{client}-{written}")).await
        } else {
            read(client, &api, &journal, &field).await
        };
        pause(&mut random, &reply).await;
    }
}

/// Writes one value and notes it.
pub(super) async fn write(
    client: usize,
    api: &Api,
    journal: &Journal,
    field: &Field,
    value: String,
) -> Reply {
    let called = journal.now();
    let reply = api.call(field.method.clone(), &field.path, Some(&field.body(&value))).await;
    let call = RegisterCall::Write(value);
    let operation = match &reply {
        Reply::Answer(status, _) if *status < 300 => {
            Some(journal.operation(client, call, called, Some(RegisterAnswer::Written)))
        }
        Reply::Answer(status, body) => {
            let finding = format!("writing {}: refused with {status} {body}", field.name);
            journal.entries().findings.push(finding);
            None
        }
        Reply::NotSent(_) => None,
        Reply::Lost(_) => Some(journal.operation(client, call, called, None)),
    };
    journal.count("write", &reply);
    if let Some(operation) = operation {
        journal.entries().registers.add(field.name, operation);
    }
    reply
}

/// Reads one value and notes it.
pub(super) async fn read(client: usize, api: &Api, journal: &Journal, field: &Field) -> Reply {
    let called = journal.now();
    let reply = api.call(Method::GET, &field.path, None).await;
    journal.count("read", &reply);
    if let Reply::Answer(status, body) = &reply {
        match field.value(body) {
            Some(value) if *status == 200 => {
                let answer = Some(RegisterAnswer::Holds(value));
                let operation = journal.operation(client, RegisterCall::Read, called, answer);
                journal.entries().registers.add(field.name, operation);
            }
            _ => {
                let finding = format!("reading {}: {status} {body}", field.name);
                journal.entries().findings.push(finding);
            }
        }
    }
    reply
}

/// Takes, frees and looks for keypairs until the end.
pub(super) async fn slots(client: usize, api: Api, journal: Arc<Journal>, mut random: Random) {
    while !journal.is_stopping() {
        let name = format!("slot-{}", random.below(SLOTS));
        let call = *random.pick(&[SlotCall::Take, SlotCall::Free, SlotCall::Look]);
        let reply = slot(client, &api, &journal, &name, call).await;
        pause(&mut random, &reply).await;
    }
}

async fn slot(client: usize, api: &Api, journal: &Journal, name: &str, call: SlotCall) -> Reply {
    let one = format!("{KEYPAIRS}/{name}");
    let keypair = json!({"keypair": {"name": name, "public_key": PUBLIC_KEY}});
    let called = journal.now();
    let (what, reply) = match call {
        SlotCall::Take => ("take", api.call(Method::POST, KEYPAIRS, Some(&keypair)).await),
        SlotCall::Free => ("free", api.call(Method::DELETE, &one, None).await),
        SlotCall::Look => ("look", api.call(Method::GET, &one, None).await),
    };
    journal.count(what, &reply);
    let answer = match &reply {
        Reply::Answer(status, _) => match (call, status) {
            (SlotCall::Look, 200) | (SlotCall::Take, 409) => Some(SlotAnswer::There),
            (_, 404) => Some(SlotAnswer::Missing),
            (_, 200..=299) => Some(SlotAnswer::Done),
            (_, status) => {
                let finding = format!("{what} {name}: answered with {status}");
                journal.entries().findings.push(finding);
                return reply;
            }
        },
        Reply::NotSent(_) => return reply,
        Reply::Lost(_) => None,
    };
    let operation = journal.operation(client, call, called, answer);
    journal.entries().slots.add(name.to_owned(), operation);
    reply
}

/// The think time of a client; one that was not served comes back later.
async fn pause(random: &mut Random, reply: &Reply) {
    let (low, high) = if matches!(reply, Reply::Answer(..)) { (20, 200) } else { (200, 800) };
    tokio::time::sleep(Duration::from_millis(random.between(low, high))).await;
}
