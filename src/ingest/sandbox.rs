//! What the process that decodes uploaded pictures may still do: read and write below the folders that it was given, and
//! nothing else. Landlock for files, a system call filter for sockets and programs; both are given up for good.
//!
//! A kernel without one of them gives less ([`Confined`] says so, and `lorad doctor` tells); the limits of
//! [`super::inspect`] hold everywhere. Knows no pictures. Called by `inspect`, in the child, and by the command line.

use std::path::PathBuf;

/// What is enforced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Confined {
    /// No file outside the given folders can be opened.
    pub files: bool,
    /// No socket can be made and no program be started.
    pub calls: bool,
}

/// Confines this thread, and the threads and processes that it starts from now on, to reading below `read` and to making and
/// writing files below `write`.
pub fn confine(read: &[PathBuf], write: &[PathBuf]) -> Confined {
    let confined = Confined {
        files: imp::files(read, write),
        calls: imp::calls(),
    };
    if !(confined.files && confined.calls) {
        tracing::warn!(?confined, "this kernel cannot confine the picture decoder fully");
    }
    confined
}

/// What this machine can enforce, tried on a thread that ends at once.
pub fn available() -> Confined {
    let nothing = Confined {
        files: false,
        calls: false,
    };
    std::thread::spawn(|| confine(&[], &[])).join().unwrap_or(nothing)
}

#[cfg(target_os = "linux")]
mod imp {
    use std::collections::BTreeMap;

    use landlock::{
        ABI, Access as _, AccessFs, AccessNet, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _, RulesetError,
        RulesetStatus, path_beneath_rules,
    };
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

    use super::PathBuf;

    pub(super) fn files(read: &[PathBuf], write: &[PathBuf]) -> bool {
        // The newest that is asked for; the crate takes what the kernel has of it.
        let abi = ABI::V5;
        let restrict = || -> Result<RulesetStatus, RulesetError> {
            let writing = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::MakeReg | AccessFs::Truncate;
            let status = Ruleset::default()
                .handle_access(AccessFs::from_all(abi))?
                .handle_access(AccessNet::from_all(abi))?
                .create()?
                .add_rules(path_beneath_rules(read, AccessFs::ReadFile))?
                .add_rules(path_beneath_rules(write, writing))?
                .restrict_self()?;
            Ok(status.ruleset)
        };
        match restrict() {
            Ok(status) => status != RulesetStatus::NotEnforced,
            Err(error) => {
                tracing::warn!(%error, "Landlock was not set up");
                false
            }
        }
    }

    /// Calls that a decoder of pictures never makes.
    const FORBIDDEN: [libc::c_long; 8] = [
        libc::SYS_socket,
        libc::SYS_socketpair,
        libc::SYS_connect,
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_ptrace,
        libc::SYS_io_uring_setup,
        libc::SYS_process_vm_writev,
    ];

    pub(super) fn calls() -> bool {
        let filter = || -> Result<(), Box<dyn std::error::Error>> {
            let rules: BTreeMap<i64, _> = FORBIDDEN.iter().map(|call| (*call, Vec::new())).collect();
            let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
            let arch = std::env::consts::ARCH.try_into()?;
            let program: BpfProgram = SeccompFilter::new(rules, SeccompAction::Allow, refused, arch)?.try_into()?;
            Ok(seccompiler::apply_filter(&program)?)
        };
        match filter() {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "the system call filter was not set up");
                false
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod imp {
    use super::PathBuf;

    pub(super) fn files(_: &[PathBuf], _: &[PathBuf]) -> bool {
        false
    }

    pub(super) fn calls() -> bool {
        false
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{fs, net};

    use super::*;

    #[test]
    fn a_confined_thread_opens_nothing_but_its_folder_and_no_socket() {
        let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(inside.path().join("mine"), b"x").unwrap();
        fs::write(outside.path().join("other"), b"x").unwrap();
        std::os::unix::fs::symlink(outside.path().join("other"), inside.path().join("link")).unwrap();
        let listener = net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (folder, other, address) = (
            inside.path().to_owned(),
            outside.path().to_owned(),
            listener.local_addr().unwrap(),
        );
        let child = std::thread::spawn(move || {
            let confined = confine(std::slice::from_ref(&folder), std::slice::from_ref(&folder));
            assert!(fs::read(folder.join("mine")).is_ok());
            fs::write(folder.join("new"), b"y").unwrap();
            let refused = [
                fs::File::open("/etc/passwd").is_err(),
                fs::read(folder.join("link")).is_err(),
                fs::read_dir("/").is_err(),
                fs::write(other.join("new"), b"y").is_err(),
                fs::remove_file(other.join("other")).is_err(),
            ];
            let no_calls = [
                net::TcpStream::connect(address).is_err(),
                net::UdpSocket::bind("127.0.0.1:0").is_err(),
                std::os::unix::net::UnixStream::pair().is_err(),
                std::process::Command::new("/bin/true").status().is_err(),
            ];
            (confined, refused, no_calls)
        });
        let (confined, refused, no_calls) = child.join().unwrap();
        // What the kernel has is enforced whole; what it lacks is said, and `lorad doctor` says it too.
        assert_eq!(refused, [confined.files; 5]);
        assert!(no_calls == [true; 4] || !confined.calls, "{no_calls:?}");
        assert_eq!(available(), confined);
    }
}
