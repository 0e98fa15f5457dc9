//! `trine cluster status`.

use super::{Common, ask};
use crate::cli::status::print_table;
use crate::daemon::administration::ClusterRequest;
use anyhow::Result;
use serde_json::Value;

/// Prints how the cluster is.
pub(super) fn run(args: &Common) -> Result<()> {
    let status = ask(&args.data_dir, ClusterRequest::Status)?;
    if args.json {
        println!("{status}");
        return Ok(());
    }
    let leader = status["leader"].as_u64().map_or("none".into(), |id| id.to_string());
    let quorum = if status["quorum"] == true { "yes" } else { "NO" };
    println!(
        "cluster {}   quorum {quorum}   leader {leader}   term {}   feature level {}",
        status["cluster_id"].as_str().unwrap_or_default(),
        status["term"],
        status["feature_level"]
    );
    let members = [
        "id",
        "name",
        "address",
        "role",
        "reachable",
        "committed",
        "applied",
        "lag",
        "fsync_us_p50",
    ];
    print_table("Members", &status["members"], &members);
    let hosts = [
        "id",
        "name",
        "address",
        "up",
        "member",
        "fenced",
        "evacuate",
        "servers",
        "volumes",
        "images_only_here",
    ];
    print_table("Hosts", &status["hosts"], &hosts);
    for note in notes(&status) {
        println!("! {note}");
    }
    Ok(())
}

/// What somebody should look at, one sentence each.
fn notes(status: &Value) -> Vec<String> {
    let mut notes = Vec::new();
    if status["quorum"] != true {
        notes.push(
            "no quorum answers: nothing can be changed. Start the other nodes; if they are gone for \
             good: trine cluster recover"
                .into(),
        );
    }
    for member in status["members"].as_array().into_iter().flatten() {
        let name = member["name"].as_str().unwrap_or_default();
        for key in ["error", "failure", "healing", "no_space"] {
            if let Some(what) = member[key].as_str() {
                notes.push(format!("{name}: {what}"));
            }
        }
    }
    for host in status["hosts"].as_array().into_iter().flatten() {
        let name = host["name"].as_str().unwrap_or_default();
        if host["started"] == false {
            notes.push(format!(
                "{name} has joined and never started: trine node there, or trine cluster remove {name}"
            ));
        }
        if let Some(by) = host["replaced_by"].as_u64() {
            notes.push(format!(
                "{name} was replaced by host {by} and goes when nothing is left on it: {} servers, \
                 {} volumes",
                host["servers"], host["volumes"]
            ));
        }
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::notes;
    use serde_json::json;

    #[test]
    fn what_is_wrong_is_said_and_what_is_well_is_not() {
        let member = json!({"name": "node1", "failure": null, "healing": null, "no_space": null});
        let host = json!({"name": "node1", "started": true, "replaced_by": null});
        let well = json!({"quorum": true, "members": [member], "hosts": [host]});
        assert!(notes(&well).is_empty(), "{:?}", notes(&well));
        let ill = json!({
            "quorum": false,
            "members": [{"name": "node2", "error": "no answer", "no_space": "disk is full"}],
            "hosts": [{"name": "node3", "started": false},
                {"name": "node2", "started": true, "replaced_by": 4, "servers": 2, "volumes": 0}],
        });
        let notes = notes(&ill);
        for part in ["no quorum", "node2: no answer", "disk is full", "remove node3", "2 servers"] {
            assert!(notes.iter().any(|note| note.contains(part)), "{part} in {notes:?}");
        }
    }
}
