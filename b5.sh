. /tmp/hunt/h.sh
O=/tmp/hunt/o; B=/tmp/hunt/base; N=5
cpb() { rm -rf $1; cp -r $B $1; }
echo "== diverge"; X T --log_dir $O/e1 --lr 1e38 --max_steps 60
echo "== c1 killed before first save"; cpb $O/c5; (timeout -s KILL 5 $PY scripts/image_train.py --data_dir /tmp/hunt/d3 --model MDTv2_Nano_2 --image_size 8 --vae identity --mask_ratio 0.3 --batch_size 8 --num_workers 0 --max_steps 10000 --log_dir $O/c5 --resume_checkpoint $O/c5/ema_0.9999_000001.pt >/dev/null 2>&1); ls $O/c5;  X T --log_dir $O/c5 --resume_checkpoint $O/c5/ema_0.9999_000001.pt
echo "== truncated older step"; cpb $O/c6; truncate -s 1000 $O/c6/model000001.pt; X T --log_dir $O/c6 --resume_checkpoint $O/c6/model000001.pt; ls $O/c6; 
echo "== other ema"; cpb $O/c7; X T --log_dir $O/c7 --resume_checkpoint $O/c7/model000001.pt --ema_rate 0.5;  X T --log_dir $O/c7 --resume_checkpoint $O/c7/model000001.pt --ema_rate 0.5 --allow_config_change; ls $O/c7
echo "== truncated newest, auto"; cpb $O/c8; truncate -s 1000 $O/c8/model000003.pt; X T --log_dir $O/c8 --max_steps 4
echo "== truncated opt newest, auto"; cpb $O/c9; truncate -s 1000 $O/c9/opt000003.pt; X T --log_dir $O/c9 --max_steps 4
echo "== hostile opt"; cpb $O/c10; $PY -c "
import torch; torch.save({'optimizer':{}}, '$O/c10/opt000003.pt')"; X T --log_dir $O/c10 --max_steps 4
echo "== missing model file newest"; cpb $O/c11; rm $O/c11/model000003.pt; X T --log_dir $O/c11 --max_steps 4
echo "== NaN model000003 auto"; cpb $O/c12; $PY -c "
import torch; f='$O/c12/model000003.pt'; s=torch.load(f); s['final_layer.linear.weight'][0,0]=float('nan'); torch.save(s,f)"; X T --log_dir $O/c12 --max_steps 4
echo "== ema with space"; X T --log_dir $O/c13 --ema_rate "0.9, 0.99"; ls $O/c13; X T --log_dir $O/c13 --ema_rate "0.9, 0.99" --max_steps 4
