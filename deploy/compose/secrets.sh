#!/bin/sh
# Makes the passwords that compose.yml hands out, each in a file of secrets/; what is there stays.
# Passwords of vendors are yours to write there.
set -eu
cd "$(dirname "$0")"
deploy=$(cd .. && pwd)

# The services run as users of their own and read these files as they are on the disk: it is the
# folder that keeps others out.
umask 022
mkdir -p -m 700 secrets
cd secrets

for name in poller_token redis_password mqtt_password subscriber_password grafana_password; do
    [ -s "$name" ] || od -An -N24 -tx1 /dev/urandom | tr -d ' \n' >"$name"
done
[ -e kylin_password ] || echo "write the password of the source here" >kylin_password

sed -e "s/>change-me-too/>$(cat subscriber_password)/" -e "s/>change-me/>$(cat redis_password)/" \
    "$deploy/redis.acl" >redis_users

printf 'poller:%s\nsubscriber:%s\n' "$(cat mqtt_password)" "$(cat subscriber_password)" >mosquitto_passwords
if command -v mosquitto_passwd >/dev/null; then
    mosquitto_passwd -U mosquitto_passwords
else
    docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/secrets" eclipse-mosquitto:2.0.20 \
        mosquitto_passwd -U /secrets/mosquitto_passwords
fi
chmod 644 mosquitto_passwords
